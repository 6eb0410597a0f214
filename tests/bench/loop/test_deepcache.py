"""DeepCache, an opponent of the loop benchmark: it reuses what its paper says and nothing else."""

from typing import Any

import torch

from loop.deepcache import DeepCache
from loop.models import HIDDEN


def test_it_reuses_what_enters_the_last_up_block_and_nothing_else():
    (net, *_), deep, kept = HIDDEN["tiny"].build(torch.device("cpu")), [], []
    net.mid_block.register_forward_hook(lambda *_: deep.append(1))
    cache = DeepCache(net, 3)
    calls = [(torch.randn(2, 1, 8, 8), torch.full((2,), 900 - 100 * i)) for i in range(7)]

    def whole(x: Any, t: Any) -> Any:
        return net(x, t).sample

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    def put(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((kept[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept[-1]})

    with torch.inference_mode():
        found = [cache(x, t, {}) for x, t in calls]
        assert len(deep) == 3, "steps 0, 3 and 6"
        for i, (x, t) in enumerate(calls):
            handle = net.up_blocks[-1].register_forward_pre_hook(keep if i % 3 == 0 else put, with_kwargs=True)
            torch.testing.assert_close(found[i], whole(x, t), rtol=1e-5, atol=1e-6)
            handle.remove()
            assert (found[i] - whole(x, t)).abs().max() > 1e-3 or i % 3 == 0, "reuse is an approximation"
        assert cache.state_bytes() == kept[-1].numel() * 4
        cache.reset()
        torch.testing.assert_close(cache(*calls[1], {}), whole(*calls[1]), rtol=1e-5, atol=1e-6)
