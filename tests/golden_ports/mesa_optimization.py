"""Our values for the golden cases of `mesa_optimization`: complex arrays in pairs of real ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.papers.mesa_optimization.model import embedding, predict, sequence_loss


def given(case, name):
    return case.arrays[f"{name}_re"] + 1j * case.arrays[f"{name}_im"]


def pair(name, value, sign=1):
    """The pair of a file; `sign` -1 of a JAX gradient, which is the conjugate."""
    return {f"{name}_re": np.real(value), f"{name}_im": sign * np.imag(value)}


def forward_train(case):
    x, E, cotangent = (given(case, f"in/{name}") for name in ("sequence", "E", "cotangent"))
    w_kq, w_pv = given(case, "param/WKQ"), given(case, "param/WPV")
    np.testing.assert_array_equal(embedding(x), E)

    def main(w_kq, w_pv, E):
        yhat = predict(w_kq, w_pv, E)
        scalar = jnp.sum(yhat.real * cotangent.real + yhat.imag * cotangent.imag)
        return scalar, yhat

    def loss(w_kq, w_pv):
        return sequence_loss(predict(w_kq, w_pv, E), x).mean()

    gradient = jax.jit(jax.grad(main, argnums=(0, 1, 2), has_aux=True))
    (by_kq, by_pv, by_E), yhat = gradient(w_kq, w_pv, E)
    value, (loss_by_kq, loss_by_pv) = jax.jit(jax.value_and_grad(loss, (0, 1)))(w_kq, w_pv)
    return {
        **pair("out/main", yhat),
        "out/loss": value,
        **pair("grad_param/WKQ", by_kq, -1),
        **pair("grad_param/WPV", by_pv, -1),
        **pair("grad_in/E", by_E, -1),
        **pair("out/loss_grad_WKQ", loss_by_kq, -1),
        **pair("out/loss_grad_WPV", loss_by_pv, -1),
    }


PORTS = {
    "full_one_random_weights": forward_train,
    "gaussian_random_weights": forward_train,
    "sparse_diagonal": forward_train,
}
