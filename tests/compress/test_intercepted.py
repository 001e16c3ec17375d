import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.compress.intercepted import Intercepted
from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Einsum


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Weights times a parameter of their own, counted in a collection."""

    start: float

    def __call__(self, method, args, kwargs, context):
        if not isinstance(context.module, Einsum) or context.method_name != "contract":
            return method(*args, **kwargs)
        x, kernel, bias = args
        gain = context.module.param("gain", jax.nn.initializers.constant(self.start), ())
        calls = context.module.variable("counts", "calls", jnp.zeros, ())
        if context.module.is_mutable_collection("counts"):
            calls.value = calls.value + 1
        return method(x, kernel * gain, bias)


def test_interceptors_declare_parameters_and_collections():
    model = Einsum("...D,DF->...F", (3,))
    changed = Intercepted(model, (Scaled(2.0),))
    assert changed == Intercepted(model, (Scaled(2.0),))
    x = jnp.ones((2, 4))
    variables = changed.init(jax.random.key(0), x)
    plain = {name: variables["params"][name] for name in ("kernel", "bias")}
    apply = jax.jit(lambda v, x: changed.apply(v, x, mutable=["counts"]))
    y, state = apply(variables, x)
    np.testing.assert_allclose(y, 2 * model.apply({"params": plain}, x), rtol=1e-6)
    assert state["counts"]["calls"] == variables["counts"]["calls"] + 1
    gradient = jax.grad(lambda v: changed.apply(v, x).sum())(variables)["params"]["gain"]
    assert gradient != 0


def test_the_first_interceptor_is_outermost():
    """What it hands on, the next ones change."""

    @dataclasses.dataclass(frozen=True)
    class Log:
        name: str
        log: list = dataclasses.field(default_factory=list, compare=False)

        def __call__(self, method, args, kwargs, context):
            if context.method_name == "contract":
                self.log.append(self.name)
            return method(*args, **kwargs)

    log = []
    model = Intercepted(Einsum("...D,DF->...F", (3,)), (Log("first", log), Log("second", log)))
    model.init(jax.random.key(0), jnp.ones((1, 2)))
    assert log == ["first", "second"]


def test_new_parameters_start_beside_trained_ones():
    plain = Einsum("...D,DF->...F", (3,))
    x = jnp.ones((2, 4))
    params = plain.init(jax.random.key(0), x)["params"]
    changed = Intercepted(plain, (Scaled(2.0),))
    extra = {"teacher": {"params": jnp.ones(2)}, "step": 3}
    found, kept = jax.jit(lambda p: changed.complete(jax.random.key(1), p, extra, x))(params)
    assert found["gain"] == 2 and kept["counts"]["calls"] == 1
    np.testing.assert_array_equal(found["kernel"], params["kernel"])
    np.testing.assert_array_equal(kept["teacher"]["params"], np.ones(2))
    with pytest.raises(ConfigError, match=r"parameters: gain and 1 in all are missing"):
        changed.complete(jax.random.key(1), params, {}, x, fresh="other$")
