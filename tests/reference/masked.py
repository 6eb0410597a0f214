"""Masked diffusion of three tokens by enumeration, float64: 64 states, all transitions as matrices, the tilted law."""

import itertools

import numpy as np

LETTERS, LENGTH, MASK, LEAST = 3, 3, 3, 1e-3
STATES = np.array(list(itertools.product(range(LETTERS + 1), repeat=LENGTH)))
"""All of them; token 3 is the mask."""
TEXTS = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))


class Toy:
    """joint: (27,) probabilities of the texts. reward: (27,)."""

    def __init__(self, joint: np.ndarray, reward: np.ndarray) -> None:
        self.joint, self.reward = joint, reward

    def posterior(self) -> np.ndarray:
        """(64, 3, 3): p(letter of a position | the letters that a state shows), exact."""
        fits = ((STATES[:, None] == MASK) | (STATES[:, None] == TEXTS[None])).all(-1)
        weights = fits * self.joint
        weights /= weights.sum(1, keepdims=True)
        return np.einsum("sx,xlv->slv", weights, TEXTS[:, :, None] == np.arange(LETTERS))

    def transition(self, step: int, steps: int, remask: float = 0.0) -> np.ndarray:
        """(64, 64): from each state to each, in one step."""
        now, then = (1 - (1 - LEAST) * (1 - i / steps) for i in (step, step + 1))
        sigma = remask * min(1.0, (1 - then) / now)
        unmask = (then - (1 - sigma) * now) / (1 - now)
        chance = np.zeros((len(STATES), LENGTH, LETTERS + 1))
        masked = STATES == MASK
        chance[..., :LETTERS] = masked[..., None] * unmask * self.posterior()
        chance[..., :LETTERS] += ~masked[..., None] * (1 - sigma) * (STATES[..., None] == np.arange(LETTERS))
        chance[..., MASK] = np.where(masked, 1 - unmask, sigma)
        return np.prod([chance[:, i][:, STATES[:, i]] for i in range(LENGTH)], axis=0)

    def law(self, steps: int, remask: float = 0.0) -> np.ndarray:
        """(27,): of what the sampler ends with."""
        at = (STATES == MASK).all(1).astype(float)
        for step in range(steps):
            at = at @ self.transition(step, steps, remask)
        return at[(STATES != MASK).all(1)]

    def target(self, steps: int, temperature: float, remask: float = 0.0) -> np.ndarray:
        """(27,): the sampler's law times exp(reward / temperature)."""
        tilted = self.law(steps, remask) * np.exp(self.reward / temperature)
        return tilted / tilted.sum()

    def partial(self, temperature: float) -> np.ndarray:
        """(64,): log of the mean of exp(reward / temperature) over independent draws of a state's masks, scaled."""
        p = self.posterior()
        chance = np.prod([p[:, i][:, TEXTS[:, i]] for i in range(LENGTH)], axis=0)
        return temperature * np.log(chance @ np.exp(self.reward / temperature))


def variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation, half of the L1 distance."""
    return float(np.abs(p - q).sum() / 2)


def random_toy() -> Toy:
    """A joint from a Dirichlet, rewards uniform in [1/3, 3/2]: TV(law, joint) = .152, TV(law, target at 1/4) = .429."""
    random = np.random.default_rng(37)
    return Toy(random.dirichlet(np.full(len(TEXTS), 0.5)), random.uniform(1 / 3, 3 / 2, len(TEXTS)))
