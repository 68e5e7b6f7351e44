"""The commands of `cxr`. Each is one entry of COMMANDS; its module is imported only when it is called.

The command `score` is the module `score` of this package, and `export kaggle-siim` is `export_kaggle_siim`. A module
has a docstring, which is its help; `Options`, a dataclass with a default for each option; and `main`, which takes
them and returns the contents of result.json, or what to print (`info`). Modules import torch, Ray and matplotlib
inside functions where they can, so that help, wrong options and missing files are reported at once.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Job:
    """What a command consists of once its module is imported."""

    main: Callable[[Any], Any]
    options: Any
    """The default options."""
    description: str

    def parse(self, arguments: Sequence[str], program: str | None = None) -> Any:
        """The `cxr.runtime.job.Command` of a command line; exits with 2 if it is wrong."""
        from cxr.runtime.job import parse

        return parse(self.options, arguments, self.description, program)


@dataclass(frozen=True)
class Command:
    """A command of `cxr`."""

    name: str
    """Its words: `score`, or `train align`."""
    script: str = ""
    """The script in jobs/ that runs the same, without its suffix."""

    @property
    def module(self) -> str:
        """Name of the module in this package."""
        return self.name.replace(" ", "_").replace("-", "_")

    @property
    def summary(self) -> str:
        """One sentence. The module is read, not imported."""
        source = (Path(__file__).parent / f"{self.module}.py").read_text()
        return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]

    def load(self) -> Job:
        """Import the command's module."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        return Job(module.main, module.Options(), module.__doc__ or "")

    def run(self, arguments: Sequence[str], program: str | None = None) -> NoReturn:
        """Run the command and exit, as `cxr.runtime.job.run` says, or `show` if it has no option `--out`."""
        from cxr.runtime import job

        loaded = self.load()
        parsed = loaded.parse(arguments, program)
        if not hasattr(parsed.job, "out"):
            job.show(loaded.main, parsed)
        if hasattr(parsed.job, "planning") and parsed.job.planning.plan:
            from cxr.cli.plans import plan_of

            job.show(plan_of, parsed)
        job.run(loaded.main, parsed, self.name)


@dataclass(frozen=True, kw_only=True)
class FamilyCommand(Command):
    """`train FAMILY` or `tune FAMILY`: their options are those of all families and the settings of the recipe."""

    text: str
    """The summary."""
    examples: tuple[str, ...] = ()
    """Command lines for the help."""
    phantoms: int = 160
    """Number of images in the phantom archive that is generated if no archive is given."""
    preset: str = ""
    """Preset whose settings are the defaults. Empty: the defaults of the family."""
    own_module: str = ""
    """Module with the command's `Options` and `main`, if it has options or steps that other families do not have."""

    @property
    def module(self) -> str:
        return self.own_module or self.name.partition(" ")[0]

    @property
    def summary(self) -> str:
        return self.text

    def load(self) -> Job:
        from cxr.cli.options import ArchiveOptions
        from cxr.families import recipe_type
        from cxr.families.presets import preset

        verb, _, family = self.name.partition(" ")
        module, recipe = importlib.import_module(f"{__name__}.{self.module}"), recipe_type(family)
        options = module.Options(
            out=f"runs/{verb}_{family}",
            data=ArchiveOptions(phantoms=self.phantoms),
            recipe=preset(recipe, self.preset) if self.preset else recipe(),
        )
        examples = (f"cxr {self.name}  # on a phantom archive", *self.examples)
        defaults = [f"The defaults are those of the preset {self.preset}."] if self.preset else []
        return Job(module.main, options, "\n\n".join([self.text, *examples, *defaults]))


def _train(family: str, text: str, *examples: str, **more: Any) -> FamilyCommand:
    return FamilyCommand(f"train {family}", f"train_{family}", text=text, examples=examples, **more)


def _tune(family: str, text: str, *examples: str, **more: Any) -> FamilyCommand:
    examples = examples or (f"cxr tune {family} --archive s3://xrays/nih --out s3://xrays/tune --trials 20",)
    return FamilyCommand(f"tune {family}", f"tune_{family}", text=text, examples=examples, **more)


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("phantom", "make_phantom"),
        Command("inspect", "inspect_archive"),
        Command("ingest", "ingest_archive"),
        _train(
            "aecnn",
            "Train an AE-CNN: a codec that compresses chest X-rays, and a classifier of the compressed images.",
            "cxr train aecnn --archive /data/nih --preset published --out runs/published",
            phantoms=1200,
        ),
        _train(
            "align",
            "Train an aligner: an unsupervised spatial transformer that registers chest X-rays to a common frame.",
        ),
        _train(
            "attend",
            "Train a network that locates findings by comparing aligned chest X-rays with images without findings.",
            "cxr train align --archive /data/nih --out runs/align",
            "cxr train attend --archive /data/nih --preset published --aligner runs/align/checkpoint",
            phantoms=800,
        ),
        _train(
            "classify",
            "Train a multi-label classifier with a torchvision or timm backbone.",
            "cxr train classify --archive s3://xrays/nih --preset densenet121-chexnet --out s3://xrays/classify",
            "cxr train classify --embeddings s3://xrays/scores --labels s3://xrays/labels.csv --out s3://xrays/head",
            phantoms=1200,
            own_module="train_classify",
        ),
        _train(
            "detect",
            "Train YOLOv5 to detect findings as bounding boxes: one network, or an ensemble.",
            "cxr train detect --archive s3://xrays/vin --preset ultralytics --out s3://xrays/detect --workers 8",
            "cxr train detect --archive s3://xrays/vin --preset ultralytics --stored-size 1024 --folds 5 \\\n"
            "    --members 5 --architectures yolov5s yolov5m --sizes 640 1024 --out s3://xrays/ensemble",
            phantoms=400,
            preset="demo",
            own_module="train_detect",
        ),
        Command("train gate", "train_gate"),
        _train(
            "localize",
            "Train a classifier that also locates findings, from image-level labels only.",
            "cxr train localize --archive s3://xrays/nih --out s3://xrays/localize --preset published",
            phantoms=1200,
        ),
        _train(
            "lungs",
            "Train a network that segments the lung fields; its checkpoint crops images for other families "
            "(--lung-crop).",
            "cxr train lungs --archive /data/montgomery --archive /data/shenzhen --out runs/lungs",
        ),
        Command("train phantom-lungs", "train_phantom_lungs"),
        _train(
            "pneumothorax",
            "Train a network that segments pneumothorax, as annotated in SIIM-ACR (2019).",
            "cxr train pneumothorax --archive /data/siim --preset siim --out runs/pneumothorax",
            phantoms=600,
            preset="demo",
            own_module="train_pneumothorax",
        ),
        _tune(
            "aecnn",
            "Search the AE-CNN's loss weights, codec, compression, classifier and learning rate.",
            "cxr tune aecnn --archive s3://xrays/nih --out s3://xrays/tune --trials 40 \\\n"
            "    --objectives mean_auroc psnr_pooled",
            phantoms=1200,
            preset="fast",
        ),
        _tune(
            "align",
            "Search the aligner's loss weights, features, network, parameterization, target and learning rate.",
            preset="fast",
        ),
        _tune(
            "attend",
            "Search the learning rate, box weight and backbone of a network that compares aligned chest X-rays.",
            phantoms=800,
        ),
        _tune(
            "classify",
            "Search the learning rate, class weights, head and backbone size of a multi-label classifier.",
            "cxr tune classify --archive s3://xrays/nih --out s3://xrays/tune --trials 20",
            "cxr tune classify --embeddings s3://xrays/scores --out s3://xrays/tune --trials 200",
            phantoms=1200,
            own_module="tune_classify",
        ),
        _tune(
            "detect",
            "Search a detector's learning rate, loss weights and augmentation.",
            phantoms=400,
            preset="demo",
        ),
        _tune(
            "localize", "Search the learning rate and pooling of a classifier that locates findings.", phantoms=1200
        ),
        _tune("lungs", "Search the learning rate and loss weights of a lung segmentation network."),
        _tune(
            "pneumothorax",
            "Search the learning rate and loss weights of a pneumothorax segmentation network.",
            phantoms=600,
            preset="demo",
            own_module="tune_pneumothorax",
        ),
        Command("import-weights", "import_weights"),
        Command("ensemble", "join_checkpoints"),
        Command("score", "score_archive"),
        Command("evaluate", "evaluate_run"),
        Command("report", "report_run"),
        Command("thresholds", "choose_thresholds"),
        Command("info"),
        Command("submit"),
        Command("export onnx", "export_onnx"),
        Command("export csv", "export_csv"),
        Command("export coco", "export_coco"),
        Command("export dicom", "export_dicom"),
        Command("export kaggle-siim", "submit_siim"),
        Command("export kaggle-vinbigdata", "submit_vinbigdata"),
        Command("study aecnn", "study_aecnn"),
        Command("study alignment", "study_alignment"),
        Command("study detection", "study_detection"),
        Command("study features", "study_features"),
        Command("study localization", "study_localization"),
        Command("study lungs", "study_lungs"),
        Command("study pneumothorax", "study_pneumothorax"),
        Command("study preprocessing", "study_preprocessing"),
        Command("benchmark align", "benchmark_align"),
        Command("benchmark compression", "benchmark_compression"),
        Command("benchmark detect", "benchmark_detect"),
        Command("benchmark families", "benchmark_families"),
        Command("benchmark fusion", "benchmark_fusion"),
        Command("benchmark heads", "benchmark_heads"),
        Command("benchmark input", "benchmark_input"),
        Command("benchmark map-boxes", "benchmark_map_boxes"),
        Command("benchmark onnx", "benchmark_onnx"),
        Command("benchmark score", "benchmark_score"),
        Command("benchmark step", "benchmark_step"),
    )
}

GROUPS = {
    "train": ("FAMILY", "Train a network of a family, or one that ships with cxr (gate, phantom-lungs)."),
    "tune": ("FAMILY", "Search a family's hyperparameters with Ray Tune and Optuna."),
    "export": ("FORMAT", "Write scores or checkpoints in the format of other software."),
    "study": ("NAME", "Train networks in different ways and compare their scores."),
    "benchmark": ("NAME", "Measure speed, or compare with other methods and software."),
}
"""Commands of two words, by their first: a word for the second, and what they do."""
