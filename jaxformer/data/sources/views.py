"""Objects of coloured points seen from anywhere: a small renderer of views, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch

POINTS = 96  # of an object
DISTANCE = 4.0  # of the camera from the middle of an object, whose points lie within 1
FOCAL = 3.2  # a picture reaches 1 / FOCAL to each side at depth 1


def _segments(*ends: tuple[tuple[float, float, float], tuple[float, float, float]]) -> np.ndarray:
    """(POINTS, 3) spread evenly over straight lines."""
    share = -(-POINTS // len(ends))
    way = np.linspace(0, 1, share)[:, None]
    lines = [np.asarray(a) + way * (np.asarray(b) - np.asarray(a)) for a, b in ends]
    return np.concatenate(lines)[:POINTS]


def _curve(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(x, y, z), -1)


def _shapes() -> np.ndarray:
    """(8, POINTS, 3): helix, ring, cone, cross, stairs, arch, fork and cube."""
    t = np.linspace(0, 1, POINTS)
    turn = 2 * np.pi * t
    k = np.arange(POINTS)
    golden = k * np.pi * (3 - 5**0.5)
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * 0.55
    edges = [
        (tuple(a), tuple(b))
        for i, a in enumerate(corners)
        for b in corners[i + 1 :]
        if (a != b).sum() == 1
    ]
    made = [
        _curve(0.6 * np.cos(3 * turn), 1.8 * t - 0.9, 0.6 * np.sin(3 * turn)),
        _curve(0.8 * np.cos(turn), 0.25 * np.sin(turn), 0.8 * np.sin(turn)),
        _curve(0.8 * t * np.cos(golden), 0.8 - 1.6 * t, 0.8 * t * np.sin(golden)),
        _segments(
            ((-0.9, 0, 0), (0.9, 0, 0)), ((0, -0.9, 0), (0, 0.9, 0)), ((0, 0, -0.9), (0, 0, 0.9))
        ),
        _segments(
            ((-0.8, -0.8, 0), (-0.8, -0.2, 0)),
            ((-0.8, -0.2, 0), (-0.1, -0.2, 0.5)),
            ((-0.1, -0.2, 0.5), (-0.1, 0.4, 0.5)),
            ((-0.1, 0.4, 0.5), (0.7, 0.4, -0.5)),
        ),
        _curve(0.8 * np.cos(turn / 2), 1.2 * np.sin(turn / 2) - 0.6, 0.3 * np.cos(turn)),
        _segments(
            ((0, -0.9, 0), (0, 0, 0)),
            ((0, 0, 0), (0.6, 0.8, 0.2)),
            ((0, 0, 0), (-0.6, 0.8, 0.2)),
            ((0, 0, 0), (0, 0.7, -0.7)),
        ),
        _segments(*edges),
    ]
    return np.stack(made).astype(np.float32)


SHAPES = _shapes()
CLASSES = len(SHAPES)


def look(points_Nx3: jax.Array, azimuth: jax.Array, elevation: jax.Array) -> jax.Array:
    """Points in the frame of a camera on a sphere: x right, y down, z ahead; angles in radians."""
    a, e = azimuth, elevation
    turn = jnp.array([[jnp.cos(a), 0, jnp.sin(a)], [0, 1, 0], [-jnp.sin(a), 0, jnp.cos(a)]])
    tilt = jnp.array([[1, 0, 0], [0, jnp.cos(e), -jnp.sin(e)], [0, jnp.sin(e), jnp.cos(e)]])
    x, y, z = jnp.moveaxis(points_Nx3 @ turn.T @ tilt.T, -1, 0)
    return jnp.stack([x, -y, z + DISTANCE], -1)


def splat(points_Nx3: jax.Array, colours_Nx3: jax.Array, size: int) -> jax.Array:
    """(size, size, 3) in [0, 1]: points of a camera's frame as blobs, nearer ones before others."""
    x, y, z = jnp.moveaxis(points_Nx3, -1, 0)
    at = (jnp.arange(size) + 0.5) / size * 2 - 1
    blob = 1.3 * FOCAL / (size * z)  # its radius in the picture shrinks with distance
    u, v = FOCAL * x / z, FOCAL * y / z
    across = jnp.exp(-jnp.square((at[None] - u[:, None]) / (2 * blob[:, None])))
    along = jnp.exp(-jnp.square((at[None] - v[:, None]) / (2 * blob[:, None])))
    near = jnp.exp(-4.0 * (z - DISTANCE))
    cover = 1 - jnp.exp(-2 * jnp.einsum("NV,NU->VU", along, across))
    along = near[:, None] * along
    weigh = jnp.einsum("NV,NU->VU", along, across) + 1e-6
    colour = jnp.einsum("NV,NUC->VUC", along, across[..., None] * colours_Nx3[:, None])
    return cover[..., None] * colour / weigh[..., None]


def thing(key: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(points (N, 3), colours (N, 3)) of one object of a class, no two quite alike."""
    for_scale, for_noise, for_colour, for_phase = jax.random.split(key, 4)
    scale = jax.random.uniform(for_scale, (3,), minval=0.75, maxval=1.1)
    points = jnp.asarray(SHAPES)[label] * scale
    points = points + 0.03 * jax.random.normal(for_noise, points.shape)
    # Colours change over an object along a direction of its own, and tell nothing of its class.
    along = points @ jax.random.normal(for_colour, (3, 3))
    phase = jax.random.uniform(for_phase, (3,), maxval=2 * jnp.pi)
    return points, 0.6 + 0.4 * jnp.sin(2 * along + phase)


@dataclasses.dataclass(frozen=True)
class Views:
    """Rows for `DeviceData`: {"image": (size, size, 3), "label"} of objects seen from somewhere.

    The azimuth is uniform between `nearest` and `furthest` degrees to either side, the elevation
    between -20 and 20 degrees.

    Raises:
        ConfigError: angles that are no range within [0, 180].
    """

    size: int
    nearest: float
    furthest: float

    def __post_init__(self) -> None:
        if not 0 <= self.nearest < self.furthest <= 180:
            raise ConfigError(
                f"data.azimuth={self.nearest}, {self.furthest}: needs 0 <= first < second <= 180"
            )

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self._row)(row_keys)

    def _row(self, key: jax.Array) -> Batch:
        for_label, for_thing, for_side, for_azimuth, for_elevation = jax.random.split(key, 5)
        label = jax.random.randint(for_label, (), 0, CLASSES)
        points, colours = thing(for_thing, label)
        side = jnp.where(jax.random.bernoulli(for_side), 1.0, -1.0)
        degrees = jax.random.uniform(for_azimuth, (), minval=self.nearest, maxval=self.furthest)
        elevation = jax.random.uniform(for_elevation, (), minval=-20.0, maxval=20.0)
        seen = look(points, *(jnp.deg2rad(x) for x in (side * degrees, elevation)))
        return {"image": splat(seen, colours, self.size), "label": label.astype(jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Films:
    """Rows for `DeviceData`: moments of an object on its way, seen by two cameras at once.

    {"views": (2, 3, size, size, 3)}: anchor, positive (within `near` frames) and negative (beyond)
    in both; {"frames": (2, length, size, size, 3)} instead where `whole`.

    Raises:
        ConfigError: a film too short for any negative.
    """

    size: int
    length: int = 40
    near: int = 3
    whole: bool = False

    def __post_init__(self) -> None:
        if self.length <= 2 * self.near + 1:
            raise ConfigError(
                f"data.frames={self.length}: needs more than {2 * self.near + 1}, so that some lie "
                f"beyond {self.near} of each"
            )

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self._row)(row_keys)

    def _row(self, key: jax.Array) -> Batch:
        for_label, for_thing, for_cameras, for_moments, for_way = jax.random.split(key, 5)
        points, colours = thing(for_thing, jax.random.randint(for_label, (), 0, CLASSES))
        spin = jax.random.uniform(for_way, (), minval=1.5, maxval=3.0)
        cameras = jnp.deg2rad(jnp.array([[-30.0, 10.0], [30.0, 10.0]]))
        cameras = cameras + 0.1 * jax.random.normal(for_cameras, (2, 2))

        def frame(camera: jax.Array, moment: jax.Array) -> jax.Array:
            t = moment / (self.length - 1)
            turned = 0.5 * points @ _turn(spin * t) + jnp.array([1.2 * t - 0.6, 0.3 - 0.6 * t, 0.0])
            return splat(look(turned, *camera), colours, self.size)

        if self.whole:
            moments = jnp.arange(self.length)
            every = jax.vmap(jax.vmap(frame, (None, 0)), (0, None))(cameras, moments)
            return {"frames": every}
        moments = self._moments(for_moments)
        return {"views": jax.vmap(jax.vmap(frame, (None, 0)), (0, None))(cameras, moments)}

    def _moments(self, key: jax.Array) -> jax.Array:
        """Anchor, positive and negative."""
        for_anchor, for_positive, for_negative = jax.random.split(key, 3)
        at = jnp.arange(self.length)
        anchor = jax.random.randint(for_anchor, (), 0, self.length)
        apart = jnp.abs(at - anchor)
        close, far = (apart > 0) & (apart <= self.near), apart > self.near
        return jnp.stack(
            [
                anchor,
                jax.random.choice(for_positive, at, p=close / close.sum()),
                jax.random.choice(for_negative, at, p=far / far.sum()),
            ]
        )


def _turn(angle: jax.Array) -> jax.Array:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
