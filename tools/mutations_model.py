"""Deliberate bugs in the verbs and the settings."""

from __future__ import annotations

from mutation import Mutation

MODEL: tuple[Mutation, ...] = (
    Mutation(
        file="src/modiff/model/apply.py",
        old="or not twin.config.activation.dynamic:",
        new="or False:",
        tests=("tests/model/test_apply.py",),
        why="layers with static scales of their own code with those of their neighbour",
    ),
    Mutation(
        file="src/modiff/model/apply.py",
        old="shared = (twin.config.activation, twin.config.modulation,",
        new="shared = (twin.config.modulation,",
        tests=("tests/model/test_apply.py",),
        why="a layer set to 8 bits codes with its neighbour's 4",
    ),
    Mutation(
        file="src/modiff/model/remove.py",
        old="    for handle in attachment.handles:\n        handle.remove()\n",
        new="",
        tests=("tests/model/test_remove.py",),
        why="hooks stay on a model after remove",
    ),
    Mutation(
        file="src/modiff/model/remove.py",
        old="        original.train(attachment.twins[name].training)\n",
        new="",
        tests=("tests/model/test_remove.py",),
        why="a layer comes back in training mode after model.eval()",
    ),
    Mutation(
        file="src/modiff/model/select.py",
        old="return matches[-1] if matches",
        new="return matches[0] if matches",
        tests=("tests/model/test_select.py",),
        why="the first override wins, not the last",
    ),
    Mutation(
        file="src/modiff/model/select.py",
        old="if weight.numel() < config.min_weights and not named:",
        new="if weight.numel() <= config.min_weights and not named:",
        tests=("tests/model/test_select.py",),
        why="layers of exactly min_weights are left alone",
    ),
    Mutation(
        file="src/modiff/model/trajectory.py",
        old="    try:\n        yield\n    finally:\n        clock.stop()",
        new="    yield\n    clock.stop()",
        tests=("tests/model/test_trajectory.py",),
        why="a generation that raises leaves its states in memory",
    ),
    Mutation(
        file="src/modiff/model/attachment.py",
        old="register_forward_hook(self._after, always_call=True)",
        new="register_forward_hook(self._after)",
        tests=("tests/model/test_trajectory.py",),
        why="an evaluation that raises leaves the clock inside",
    ),
    Mutation(
        file="src/modiff/model/calibrate.py",
        old="        for _, coder in coders:\n            coder.unwatch()",
        new="        pass",
        tests=("tests/model/test_calibrate.py",),
        why="an interrupted calibration goes on observing for ever",
    ),
    Mutation(
        file="src/modiff/model/probe.py",
        old="        if not starts:\n            self.signal",
        new="        if True:\n            self.signal",
        tests=("tests/model/test_probe.py",),
        why="tuning is judged on the anchored first step too",
    ),
    Mutation(
        file="src/modiff/model/tune.py",
        old="finalists[scores.index(min(scores))]",
        new="finalists[scores.index(max(scores))]",
        tests=("tests/model/test_tune.py",),
        why="tune returns the worst finalist",
    ),
    Mutation(
        file="src/modiff/hosts/verbs.py",
        old="weight=dataclasses.replace(base.layer.weight, bits=weight_bits)",
        new="weight=base.layer.weight",
        tests=("tests/model/test_tune.py",),
        why="tune ignores the weight bits it was asked for",
    ),
    Mutation(
        file="src/modiff/hosts/verbs.py",
        old="config = config or ModiffConfig()",
        new='config = config or ModiffConfig(first_last="quantize")',
        tests=("tests/model/test_apply.py",),
        why="the default config quantizes the first and last layer",
    ),
    Mutation(
        file="src/modiff/hosts/verbs.py",
        old="with _trajectory.context(module, name):",
        new='with _trajectory.context(module, "default"):',
        tests=("tests/model/test_trajectory.py",),
        why="named contexts share one state",
    ),
    Mutation(
        file="src/modiff/hosts/unet.py",
        old="layer.in_channels - skip\n",
        new="skip\n",
        tests=("tests/model/test_apply.py",),
        why="the split falls on the skip's width instead of the decoder's",
    ),
    Mutation(
        file="src/modiff/hosts/unet.py",
        old="channels += channels[-1:] if",
        new="channels += [] if",
        tests=("tests/model/test_apply.py",),
        why="downsampled skips are forgotten and splits fall on the wrong blocks",
    ),
    Mutation(
        file="src/modiff/config.py",
        old="bits == 3 and clip < 1",
        new="bits == 3",
        tests=("tests/test_config.py",),
        why="the linear predictor is allowed at 3 bits without a clip, where it diverges",
    ),
    Mutation(
        file="src/modiff/config.py",
        old="2 <= value <= 8",
        new="1 <= value <= 8",
        tests=("tests/test_config.py",),
        why="one bit passes, and qmax is zero",
    ),
)
