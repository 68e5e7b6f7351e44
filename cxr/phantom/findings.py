"""The 14 findings of ChestX-ray14: co-occurrence, changes of the anatomy, and the functions that draw them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from cxr.errors import UserError
from cxr.phantom import opacities, pleura
from cxr.phantom.anatomy import SIDES, Anatomy
from cxr.phantom.canvas import Mask, disc
from cxr.phantom.scene import LUNG_CM, Scene
from cxr.schema import FINDINGS

Draw = Callable[[Scene, np.random.Generator], list[Mask]]

# Number of images with each finding among the 112,120 in Data_Entry_2017_v2020.csv.
_IMAGES: dict[str, int] = dict(
    zip(
        FINDINGS,
        (11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227),
        strict=True,
    )
)
# Co-occurrence relative to chance in the same list; pairs that are not listed occur less often than by chance.
_TOGETHER = {
    ("Emphysema", "Pneumothorax"): 2.9,
    ("Edema", "Pneumonia"): 5.3,
    ("Fibrosis", "Pleural_Thickening"): 1.6,
    ("Cardiomegaly", "Effusion"): 1.5,
    ("Mass", "Nodule"): 1.3,
    ("Atelectasis", "Consolidation"): 1.2,
    ("Mass", "Pleural_Thickening"): 1.2,
    ("Consolidation", "Mass"): 1.2,
    ("Atelectasis", "Effusion"): 1.1,
    ("Consolidation", "Effusion"): 1.1,
    ("Edema", "Infiltration"): 1.1,
    ("Infiltration", "Pneumonia"): 1.1,
    ("Cardiomegaly", "Edema"): 1.0,
    ("Edema", "Effusion"): 1.0,
    ("Effusion", "Pleural_Thickening"): 1.0,
    ("Consolidation", "Pneumonia"): 1.0,
}
_APART = 0.7
_COUNTS = (0.60, 0.28, 0.09, 0.03)  # of abnormal images with one, two, three and four findings


def sample_findings(
    rng: np.random.Generator, findings: Sequence[str] = FINDINGS, prevalence: float = 0.5
) -> tuple[str, ...]:
    """The findings of one image, in `findings`' order; empty with probability 1 − `prevalence`.

    Findings are sampled by the square root of their frequency in ChestX-ray14, so that Hernia (1 in 500 there) also
    occurs in small archives, and with the co-occurrence of ChestX-ray14.
    """
    if rng.random() >= prevalence or not findings:
        return ()
    weights = np.sqrt([_IMAGES[finding] for finding in findings])
    count = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    sampled: set[str] = set()
    while len(sampled) < min(count, len(findings)):
        finding_name = findings[int(rng.choice(len(findings), p=weights / weights.sum()))]
        sampled.add(finding_name)
        weights = weights * [0.0 if other in sampled else _affinity(finding_name, other) for other in findings]
    return tuple(finding for finding in findings if finding in sampled)


def _affinity(first: str, second: str) -> float:
    return _TOGETHER.get((min(first, second), max(first, second)), _APART)


def check_findings(findings: Collection[str]) -> None:
    """Raise UserError if a name is not a finding of ChestX-ray14."""
    unknown = sorted(set(findings) - set(FINDINGS))
    if unknown:
        raise UserError(f"expected findings out of {', '.join(FINDINGS)}, got {', '.join(unknown)}: use these names")


def reshape(anatomy: Anatomy, findings: Collection[str], rng: np.random.Generator) -> Anatomy:
    """Change the anatomy: emphysema changes the thoracic cage, cardiomegaly the heart."""
    if "Emphysema" in findings:
        anatomy = anatomy.hyperinflated(rng.uniform(0.6, 1.0))
    if "Cardiomegaly" in findings:
        anatomy = anatomy.with_wide_heart(float(np.clip(rng.normal(0.585, 0.03), 0.535, 0.67)))
    return anatomy


def cardiomegaly(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """The silhouette of a heart enlarged by `reshape`; √(box area) is about 423 px at 1024."""
    return [scene.heart.copy()]


def emphysema(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Both lungs, hyperinflated by `reshape`: darker, with sparse markings and a few bullae."""
    canvas = scene.canvas
    scene.markings *= 0.6
    scene.air *= 1.16
    for _ in range(int(rng.integers(1, 5))):
        side = int(rng.choice(SIDES))
        bulla = canvas.inside(
            disc(scene.place(rng, side, -0.6, 0.2), rng.uniform(0.06, 0.13), rng.normal(0, 0.04, (3, 2)))
        )
        inside = canvas.blur((bulla & scene.lungs[side]).astype(np.float32), 0.004)
        scene.markings *= 1 - 0.9 * inside
        scene.air += 0.035 * LUNG_CM * inside
        scene.tissue += 1.2 * np.clip(inside * (1 - inside), 0, 1)
    return [scene.lungs[side].copy() for side in SIDES]


def hernia(scene: Scene, rng: np.random.Generator) -> list[Mask]:
    """Stomach behind the heart (hiatal hernia): a round density with gas over a fluid level."""
    canvas = scene.canvas
    radius = rng.uniform(0.12, 0.18)
    center = np.array([rng.uniform(-0.02, 0.10), scene.anatomy.dome - 0.35 * radius])
    sac = canvas.inside(disc(center, (radius * 1.1, radius), rng.normal(0, 0.02, (3, 2))))
    gas = canvas.inside(disc(center, (radius * 0.98, radius * 0.88))) & (
        canvas.y < center[1] - rng.uniform(0, 0.25) * radius
    )
    scene.tissue += 2.6 * canvas.blur(canvas.solid(sac, radius * 0.6), 0.004)
    scene.tissue -= 4.5 * canvas.blur(canvas.solid(gas, 0.06), 0.005)
    return [sac]


# In drawing order: findings that displace lung come before findings placed in the remaining lung.
DRAW: dict[str, Draw] = {
    "Cardiomegaly": cardiomegaly,
    "Emphysema": emphysema,
    "Pneumothorax": pleura.pneumothorax,
    "Effusion": pleura.effusion,
    "Hernia": hernia,
    "Pleural_Thickening": pleura.pleural_thickening,
    "Fibrosis": opacities.fibrosis,
    "Edema": opacities.edema,
    "Infiltration": opacities.infiltration,
    "Pneumonia": opacities.pneumonia,
    "Consolidation": opacities.consolidation,
    "Atelectasis": opacities.atelectasis,
    "Mass": opacities.mass,
    "Nodule": opacities.nodule,
}
