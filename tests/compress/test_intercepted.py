import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.compress.intercepted import Intercepted
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
