"""Deliberate bugs in evaluation, generation, saving and the benchmarks."""

from __future__ import annotations

from mutation import Mutation

EVALUATE: tuple[Mutation, ...] = (
    Mutation(
        file="src/modiff/hosts/conditions.py",
        old="self.labels[i % len(self.labels)] for i in indices",
        new="self.labels[k % len(self.labels)] for k, _ in enumerate(indices)",
        tests=("tests/hosts/test_conditions.py",),
        why="the class of an image depends on the batch that it is drawn in",
    ),
    Mutation(
        file="src/modiff/evaluate/suite_extras.py",
        old="range(indices.start, indices.start + len(images))",
        new="range(len(images))",
        tests=("tests/evaluate/test_suite_extras.py",),
        why="CLIP judges images of later batches by the prompts of the first",
    ),
    Mutation(
        file="src/modiff/evaluate/suite_metrics.py",
        old='"kernel_distance": "kernel_distance"',
        new='"kernel_distance": "kid"',
        tests=("tests/evaluate/test_suite_metrics.py",),
        why="a distance of the classifier's features is called KID",
    ),
    Mutation(
        file="src/modiff/evaluate/metrics/bootstrap.py",
        old="values.std(ddof=1)",
        new="values.std(ddof=0)",
        tests=("tests/evaluate/metrics/test_bootstrap.py",),
        why="intervals from few resamples are too narrow",
    ),
    Mutation(
        file="src/modiff/engine/run.py",
        old='"labels": None if job.labels is None else list(job.labels)',
        new='"labels": None',
        tests=("tests/engine/test_run.py",),
        why="a folder of images does not say which classes it holds, and goes on with others",
    ),
    Mutation(
        file="src/modiff/hosts/quantizer.py",
        old="        model._internal_dict = FrozenDict(kept)\n",
        new="",
        tests=("tests/hosts/test_save_applied.py",),
        why="a model that modiff was removed from still says that it is quantized",
    ),
    Mutation(
        file="src/modiff/methods/accuquant_folder.py",
        old="report.before, report.after, scales",
        new="report.before, report.before, scales",
        tests=("tests/methods/test_accuquant_folder.py",),
        why="a resumed job reports another loss",
    ),
    Mutation(
        file="src/modiff/hosts/sampler_steps.py",
        old="copied = copy.deepcopy(scheduler)",
        new="copied = scheduler",
        tests=("tests/methods/test_accuquant_folder.py",),
        why="a resumed job changes the pipeline's scheduler",
    ),
    Mutation(
        file="bench/loop_deepcache.py",
        old="self.count % self.interval == 0",
        new="self.count % self.interval == 1",
        tests=("tests/bench/test_denoising_loop.py",),
        why="DeepCache starts without a whole step: a weak opponent",
    ),
    Mutation(
        file="bench/loop_rounds.py",
        old="[*children[first:], *children[:first]]",
        new="children",
        tests=("tests/bench/test_loop_rounds.py",),
        why="the same variant always runs first, on a cold machine",
    ),
    Mutation(
        file="bench/loop_variants.py",
        old="steps=loop.steps // divisor",
        new="steps=loop.steps",
        tests=("tests/bench/test_denoising_loop.py",),
        why="fewer steps stop half way through the trajectory",
    ),
    Mutation(
        file="bench/loop_report.py",
        old='"seconds_min": min(seconds),',
        new='"seconds_min": seconds[0],',
        tests=("tests/bench/test_denoising_loop.py",),
        why="the minimum is the first round",
    ),
)
