"""The loop benchmark: honest opponents, processes that take turns and cannot harm each other, rows that tell."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

import denoising_loop
from loop import child as loop_child
from loop import report as loop_report
from loop import rounds as loop_rounds
from loop import variants as loop_variants
from loop.deepcache import DeepCache
from loop.models import HIDDEN, MODELS, Loop
from loop.rounds import Record
from loop.variants import VARIANTS, CannotRun, Task, parts_of, prepare
from modiff import ConfigError
from modiff.generate.samplers import UnconditionalPipeline
from modiff.kernels.isa import Isa

TINY = HIDDEN["tiny"]
ROW = [
    "model", "variant", "isa", "threads", "seconds_min", "seconds_median", "relative_l2", "peak_mib", "state_mib",
    "commit", "machine", "command",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- models


def test_a_loop_is_the_pipelines_loop_and_stops_where_it_is_told() -> None:
    net, _, _ = TINY.build(torch.device("cpu"))
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipe = UnconditionalPipeline(net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    wanted = pipe(batch_size=2, generator=noise, num_inference_steps=10, output_type="np").images
    loop = Loop(TINY, scheduler, 10, 10, torch.device("cpu"))
    seen: list[Tensor] = []

    def step(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return net(x, t).sample

    with torch.inference_mode():
        np.testing.assert_allclose(loop.run(step, 5).permute(0, 2, 3, 1).numpy(), wanted, atol=1e-6)
        assert len(loop.seconds) == len(seen) == 10
        loop.run(step, 5, timed=3)
    assert len(loop.seconds) == 3
    assert [t.tolist() for t in seen[10:]] == [[t, t] for t in scheduler.timesteps[:3].tolist()]


def test_half_of_the_steps_go_as_far_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_variants, "compiler", lambda *_: lambda net: net)
    parts = parts_of(Task(TINY, "fewer-steps-2", timed=6))
    fewer = VARIANTS["fewer-steps-2"](parts).loop
    assert (parts.loop.steps, parts.loop.timed) == (10, 6)
    assert (fewer.steps, fewer.timed) == (5, 3)
    whole = parts_of(Task(TINY, "fp32-eager", timed=6)).loop.scheduler.timesteps
    assert whole[:6].tolist() == [999, 899, 799, 699, 599, 499]
    assert fewer.scheduler.timesteps[:3].tolist() == [999, 799, 599], "599 - 200 = 499 - 100"


# ---------------------------------------------------------------------------------------------------------- DeepCache


def conditional() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, in_channels=1, out_channels=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    return net, {"encoder_hidden_states": torch.randn(2, 3, 8)}


def unconditional() -> tuple[Any, dict[str, Tensor]]:
    return TINY.build(torch.device("cpu"))[0], {}


@pytest.mark.parametrize("build", [unconditional, conditional])
def test_deepcache_reuses_what_enters_the_last_up_block_and_nothing_else(
    build: Callable[[], tuple[Any, dict[str, Tensor]]],
) -> None:
    net, inputs = build()
    deep: list[int] = []
    net.mid_block.register_forward_hook(lambda *_: deep.append(1))
    whole: Any = lambda x, t: net(x, t, **inputs).sample  # noqa: E731
    cache = DeepCache(net, 3)
    xs = [torch.randn(2, 1, 8, 8) for _ in range(7)]
    ts = [torch.full((2,), 900 - 100 * i) for i in range(7)]
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    def put(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((kept[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept[-1]})

    with torch.inference_mode():
        found = [cache(x, t, inputs) for x, t in zip(xs, ts, strict=True)]
        assert len(deep) == 3, "steps 0, 3 and 6"
        for i, (x, t) in enumerate(zip(xs, ts, strict=True)):
            handle = net.up_blocks[-1].register_forward_pre_hook(keep if i % 3 == 0 else put, with_kwargs=True)
            torch.testing.assert_close(found[i], whole(x, t), rtol=1e-5, atol=1e-6)
            handle.remove()
            assert (found[i] - whole(x, t)).abs().max() > 1e-3 or i % 3 == 0, "reuse is an approximation"
        assert cache.state_bytes() == kept[-1].numel() * 4
        copying = DeepCache(net, 3, keep=torch.clone)
        torch.testing.assert_close([copying(x, t, inputs) for x, t in zip(xs, ts, strict=True)], found)
        cache.reset()
        torch.testing.assert_close(cache(xs[1], ts[1], inputs), whole(xs[1], ts[1]), rtol=1e-5, atol=1e-6)


def test_deepcache_refuses_what_has_no_levels() -> None:
    with pytest.raises(ConfigError, match="DeepCache: expected a U-Net, got Linear without conv_in"):
        DeepCache(torch.nn.Linear(2, 2), 2)
    dit = SimpleNamespace(model=MODELS["dit-xl"])
    for variant in ("deepcache-2", "deepcache-3"):
        with pytest.raises(CannotRun, match="DeepCache is for U-Nets"):
            VARIANTS[variant](SimpleNamespace(task=dit))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ command


class ThreadProcess:
    """A child in a thread: the command in one process, for speed."""

    exitcode = 0

    def kill(self) -> None:
        """A thread that refused ends by itself."""

    def __init__(self, target: Any, args: Any, name: str) -> None:
        theirs, task = args  # the parent closes its copy of their end
        own = (Connection(os.dup(theirs.fileno())), task)
        self.thread = threading.Thread(target=target, args=own, name=name, daemon=True)
        self.start, self.join, self.is_alive = self.thread.start, self.thread.join, self.thread.is_alive


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Call the command in threads. Returns: the rows in its file so far."""
    threads: Any = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=ThreadProcess)
    monkeypatch.setattr(loop_rounds.multiprocessing, "get_context", lambda _: threads)
    monkeypatch.setattr(loop_child, "silence", lambda: None)
    monkeypatch.setattr(loop_child, "forget_peak", lambda _: None)

    def call(*arguments: str) -> list[dict[str, Any]]:
        file = tmp_path / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", ["denoising_loop.py", *arguments, "--json", str(file)])
        denoising_loop.main()
        return [json.loads(line) for line in file.read_text().splitlines()]

    return call


def test_the_command_prints_every_variant_and_appends_rows(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_variants.shutil, "which", lambda _: None)
    arguments = ("--models", "tiny", "--quick", "--variants", "fp32-eager,fp32-compiled,bf16-eager")
    rows = command(*arguments)
    assert [row["variant"] for row in rows] == ["fp32-eager", "bf16-eager"]
    exact, plain = rows
    assert list(exact) == list(plain) == ROW
    assert (exact["model"], exact["relative_l2"], exact["state_mib"]) == ("tiny", 0.0, 0.0)
    assert 0 < plain["relative_l2"] < 1
    assert 0 < plain["seconds_min"] <= plain["seconds_median"]
    assert plain["threads"] == torch.get_num_threads()
    assert plain["command"].startswith("python bench/denoising_loop.py --models tiny --quick")
    assert plain["command"].endswith("--json rows.jsonl  # tiny: random weights (speed only), batch 2, 6 of 10 steps")
    assert str(tmp_path) not in plain["command"]
    text = capsys.readouterr().out
    assert "fp32-compiled        not run: no C++ compiler: torch.compile needs g++ or clang++" in text
    assert "relative L2 says nothing about trained weights" in text
    (plot,) = tmp_path.glob("rows-tiny-*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(command(*arguments[:-1], "fp32-eager")) == 3, "rows are appended"


def test_figures_of_a_row_are_of_its_rounds() -> None:
    record: Any = Record(Task(MODELS["embedded"], "gated", timed=50))
    record.facts = {"isa": "amx", "threads": 2, "note": ""}
    for seconds, peak in ((3.0, 90.0), (1.0, 70.0), (2.5, 80.0)):
        found = {"seconds": seconds, "steps": [0.5, 0.1, 0.3, 0.2], "images": np.full(4, 3.0), "state_mib": 5.0}
        record.rounds.append({**found, "peak_mib": peak})
        record.waves.append(0)
    head = {"commit": "c", "machine": "m", "command": "x"}
    row: Any = loop_report.row_of(record, np.full(4, 4.0), head)
    assert [row[k] for k in ("seconds_min", "seconds_median", "peak_mib", "state_mib")] == [1.0, 2.5, 90.0, 5.0]
    assert row["relative_l2"] == 0.25
    assert row["command"] == "x  # embedded: batch 16, 50 of 50 steps"
    assert loop_report.steps_of(record) == (0.5, 0.2)
    assert loop_report.error_of(np.array([np.nan]), np.ones(1)) is None
    record.rounds.clear()
    assert loop_report.row_of(record, None, head) is None


def test_less_instructions_than_asked_for_are_refused() -> None:
    amx = {"amx_int8": True, "avx512_vnni": True, "avx512_f": True, "avx512_bw": True, "avx2": True, "sse4_1": True}
    assert denoising_loop.child_environment("native", None, amx) == {}
    assert denoising_loop.child_environment("vnni", 1, amx) == {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "ATEN_CPU_CAPABILITY": "avx512",
    }
    with pytest.raises(ConfigError, match=r"--isa vnni: expected .* AVX-512 VNNI, got one that reaches avx512\. "):
        denoising_loop.child_environment("vnni", None, {**amx, "avx512_vnni": False})


def test_slow_bf16_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    options: Any = SimpleNamespace(isa="native", device="cpu", limit=60)
    asked = ["fp32-eager", "bf16-eager", "bf16-compiled"]
    (eager, compiled) = denoising_loop.warnings_of(asked, options, {})
    assert eager == "bf16-eager: no bf16 instructions here, so it will be slower than float32; --limit 60 ends it"
    assert compiled.startswith("bf16-compiled")
    assert denoising_loop.warnings_of(asked, options, {"amx_bf16": True}) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--models", "embedded,sd3", "--models: expected some of embedded, .*, sdxl, dit-xl, got 'sd3'"),
        ("--variants", "gated,int4", "--variants: expected some of fp32-eager, .*, got 'int4'"),
        ("--variants", "gated,gated", "--variants: expected each name once, got 'gated' twice"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(option: str, value: str, message: str, command: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        command("--models", "tiny", option, value)


@pytest.mark.parametrize(("level", "narrow"), [("avx2", True), ("avx512_vnni", False)])
def test_torchao_codes_with_7_bits_where_8_would_saturate(
    level: Any, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(reduce_range: bool = False) -> bool:
        return reduce_range

    given: list[bool] = []
    torchao = SimpleNamespace(
        Int8DynamicActivationInt8WeightConfig=config, quantize_=lambda _, chosen, filter_fn: given.append(chosen)
    )
    monkeypatch.setattr(loop_variants, "optional", lambda module, package: torchao)
    monkeypatch.setattr(loop_variants, "detect", lambda: Isa(level))
    monkeypatch.setattr(loop_variants, "as_compiled", lambda parts, net, dtype: loop_variants.Ready(parts.loop, net))
    ready = prepare(Task(TINY, "torchao-int8", timed=1))
    assert given == [narrow]
    assert bool(ready.note) is narrow
    torchao.Int8DynamicActivationInt8WeightConfig = lambda: False
    if narrow:
        with pytest.raises(CannotRun, match="no reduce_range"):
            prepare(Task(TINY, "torchao-int8", timed=1))
