"""Does a statement follow from facts? Sentence pairs made by rule, with exact labels."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxformer.data.base import Example
from jaxformer.errors import ConfigError

ENTITIES, ATTRIBUTES, VALUES = 16, 16, 2  # values of each attribute
PAD, CLS, SEP, AND = range(4)
FIRST_ENTITY = 4
FIRST_ATTRIBUTE = FIRST_ENTITY + ENTITIES
FIRST_VALUE = FIRST_ATTRIBUTE + ATTRIBUTES
VOCABULARY = 80  # of which the last 12 do not occur
LABELS = ("entail", "contradict", "neutral")


@dataclasses.dataclass(frozen=True)
class Entailment:
    """`size` pairs of a premise of `facts` facts and a hypothesis of one, made when asked for.

    A fact is "entity attribute value"; the facts of a premise have different attributes, as else
    a match of words that does not know whose they are ends at 95.9 % (measured). The hypothesis is
    in the premise (entail), there with the attribute's other value (contradict), or says an
    attribute of an entity that the premise does not (neutral). A share `near` of the neutral have
    an attribute that the premise says of others, and cannot be told without knowing whose it is;
    in the rest it is new.

    Examples are {"inputs": (length,) int32, "valid": (length,) bool, "label": int32}: CLS, facts
    with AND between them, SEP, hypothesis, SEP. Example i depends on (seed, start + i) alone, so
    that sources of one seed whose ranges do not meet are a training and a test set.

    Raises:
        ConfigError: a length too small for the facts, or too many or few of them.
    """

    size: int
    seed: int = 0
    start: int = 0
    facts: int = 4
    near: float = 1 / 16
    length: int = 24

    def __post_init__(self) -> None:
        if not 1 <= self.facts <= 8:
            raise ConfigError(f"data.facts={self.facts}: must be from 1 to 8")
        if not 0 <= self.near <= 1:
            raise ConfigError(f"data.near={self.near}: must be in [0, 1]")
        if self.length < self.used:
            raise ConfigError(f"data.length={self.length}: {self.facts} facts need {self.used}")

    @property
    def used(self) -> int:
        """Tokens of an example that are no padding."""
        return 4 * self.facts + 5

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self.seed, self.start + index])
        entities = rng.integers(ENTITIES, size=self.facts)
        attributes = rng.choice(ATTRIBUTES, self.facts, replace=False)
        values = rng.integers(VALUES, size=self.facts)
        label, of = int(rng.integers(len(LABELS))), int(rng.integers(self.facts))
        entity, attribute, value = int(entities[of]), int(attributes[of]), int(values[of])
        if LABELS[label] == "contradict":
            value = 1 - value
        elif LABELS[label] == "neutral":
            entity, attribute = self._unsaid(rng, entities, attributes)
            value = int(rng.integers(VALUES))
        tokens = [CLS]
        for fact in zip(entities, attributes, values, strict=True):
            tokens += [*self._fact(*fact), AND]
        tokens = [*tokens[:-1], SEP, *self._fact(entity, attribute, value), SEP]
        inputs = np.full(self.length, PAD, np.int32)
        inputs[: len(tokens)] = tokens
        return {
            "inputs": inputs,
            "valid": np.arange(self.length) < len(tokens),
            "label": np.int32(label),
        }

    @staticmethod
    def _fact(entity: int, attribute: int, value: int) -> list[int]:
        word = FIRST_VALUE + VALUES * attribute + value
        return [FIRST_ENTITY + entity, FIRST_ATTRIBUTE + attribute, word]

    def _unsaid(
        self, rng: np.random.Generator, entities: np.ndarray, attributes: np.ndarray
    ) -> tuple[int, int]:
        """An entity and an attribute that no fact has together."""
        said = set(zip(entities.tolist(), attributes.tolist(), strict=True))
        near = rng.random() < self.near
        while True:
            entity, attribute = int(rng.integers(ENTITIES)), int(rng.integers(ATTRIBUTES))
            if (entity, attribute) not in said and (attribute in attributes) == near:
                return entity, attribute
