"""The required features of the four reference systems: a command for each, and what shows that the feature is there.

A is dynamic localised repulsion for brain age, B age by segmentation or CNN, C symmetry-aware Swin, D contrast-guided
pre-training. The text of a feature is that of the specification. Commands run in the folder of the campaign; what they
begin with is made by `benchmarks.feature_sources`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks import feature_facts as facts
from benchmarks.feature_checks import (
    MANIFEST,
    Check,
    changed,
    columns,
    exists,
    falls,
    holds,
    no_weight,
    only,
    page,
    same_losses,
    says,
    searched,
    setting,
    values,
    weight,
)
from benchmarks.feature_sources import TILT


@dataclass(frozen=True)
class Row:
    """A required feature, the command that shows it, and the checks of what the command leaves."""

    system: str
    feature: str
    command: str
    checks: tuple[Check, ...]
    made: Path
    """What the command makes."""
    needs: tuple[str, ...]
    """What must be there beside what the command names."""
    lacks: str
    """What of the feature a machine without GPUs cannot show, and why."""


def row(
    system: str,
    feature: str,
    command: str,
    *checks: Check,
    made: str = "",
    needs: tuple[str, ...] = (),
    lacks: str = "",
) -> Row:
    """A row; what it makes is the value of --out, or the cohort of `ingest`, if it is not given."""
    words = shlex.split(command)
    place = made or (words[words.index("--out") + 1] if "--out" in words else words[2])
    return Row(system, feature, command, checks, Path(place), needs, lacks)


SIX = ("mae", "r2", "mse", "msle", "median_ae", "explained_variance")
REGIONS = ("dice_tc", "dice_wt", "dice_et")
SCAN = "sources/people/sub-0001/anat/sub-0001_T1w.nii.gz"
CLUSTERS = "cohorts/contrasts/derived/tissue"


def small(epochs: int = 2) -> str:
    """Options of a small training of an encoder of convolutions."""
    return f"--folds 2 --set training.epochs={epochs} --set model.width=0.0625"


def quarter(epochs: int = 2) -> str:
    """Options of a small training of Swin, ResNeXt and the U-Nets, which cannot be so narrow."""
    return f"--folds 2 --set training.epochs={epochs} --set model.width=0.25 --set training.batch_size=4"


GRID = "--space files/chosen.py --sampler grid --trials 12 --scheduler none --slots 1"
"""A search of nothing but what --choose names, and of all of it."""
ALL_REPEL = "--set objective.neighbours=null"
AGES = f"train cohorts/ages {small()} {ALL_REPEL}"
AGES_GRID = f"sweep cohorts/ages {GRID} {small()}"
CLASSES = f"train cohorts/lesions --space classification {quarter()} --set data.target=sex"
UNWEIGHTED = f"{CLASSES} --set objective.class_weights=none"
NO_ROTATION, NO_CONTRAST, NO_INPAINTING, NO_SYMMETRY = (
    f"--set objective.{part}.name=null" for part in ("rotation", "contrast", "inpainting", "symmetry")
)
PRETEXT = f"train cohorts/lesions --task symmetry_pretraining {quarter()} --set model.name=swin"
PRETEXT += " --set decoder.kind=transposed"
CONTRAST = "train cohorts/contrasts --space contrast_pretraining --set data.constraint=tissue"
CONTRAST += " --set optimiser.plateau.watches=training"
TUMOURS = f"train cohorts/contrasts --space contrast_segmentation {quarter()}"
UNCHANGED = "--set views.one_of=false --set views.rotate=0 --set views.rotate_about=null --set views.zoom=0"
UNCHANGED += " --set views.flip=0 --set views.eighth_turns=null"
"""Without the augmentation of system D."""

ROWS = (
    row("A", "MRE loader: stiffness, dr, T1, metadata",
        "ingest sources/mre cohorts/mre --layout mre --channels stiffness,dr,T1 --spacing 8 --intensity raw",
        holds(facts.is_as_bright_as_old(30, 0.1, 10)), columns(MANIFEST, "age", "mre_coverage"),
        holds(facts.has_studies)),
    row("A", "OpenBHB loader joined on id",
        "ingest sources/openbhb cohorts/openbhb --layout openbhb --spacing 8 --intensity raw",
        holds(facts.is_as_bright_as_old(1))),
    row("A", "train-fitted global or per-volume non-zero z-score",
        f"{AGES} --out runs/per-volume --set data.normalise=per_volume",
        changed("runs/plain", "data.normalise"), holds(facts.scale_is_of_training)),
    row("A", "seeded k-fold; stratified/grouped options",
        f"{AGES} --out runs/by-site --leave-out site",
        holds(facts.sites_are_whole), holds(facts.folds_are_alike, "runs/plain", "runs/cutout")),
    row("A", "trial × fold runner with aggregation",
        f"sweep cohorts/ages --out runs/searched --trials 2 --seeds 2 --slots 1 --scheduler none {small()} {ALL_REPEL}",
        holds(facts.is_aggregated)),
    row("A", "V-view wrapper",
        f"{AGES} --out runs/three-views --set views.count=3",
        changed("runs/plain", "views.count")),
    row("A", "random/centre crop + pad to input shape",
        f"{AGES_GRID} --out runs/crops --set views.crop_size=16 --set views.pad_to=32 "
        "--choose views.crop_place=random,centre",
        searched("views.crop_place", count=2)),
    row("A", "cutout",
        f"{AGES} --out runs/cutout --set views.cutout=1.0",
        changed("runs/plain", "views.cutout")),
    row("A", "Gaussian noise",
        f"{AGES} --out runs/noise --set views.noise=0.05",
        changed("runs/plain", "views.noise")),
    row("A", "3-D ResNet-18/34/50/101",
        f"{AGES_GRID} --out runs/resnets --choose model.name=resnet18,resnet34,resnet50,resnet101",
        searched("model.name", count=4)),
    row("A", "MLP or linear projection head",
        f"{AGES} --out runs/linear-head --set model.head.kind=linear",
        changed("runs/plain", "model.head.kind")),
    row("A", "encoder/projection read-out",
        f"{AGES} --out runs/read-out --set model.readout=encoder --set model.head.dimension=16",
        holds(facts.probe_reads(32))),
    row("A", "supcon with age bins; SimCLR fallback",
        f"sweep cohorts/ages --out runs/bins {GRID.replace('chosen', 'bins')} {small()}",
        searched("objective.name", "objective.bin_width", count=3)),
    row("A", "y-aware",
        f"{AGES} --out runs/y-aware --set objective.name=y_aware",
        changed("runs/plain", "objective")),
    row("A", "threshold (intended + reference)",
        f"{AGES_GRID} --out runs/threshold --set objective.name=threshold --choose objective.reference=null,dynlocrep",
        searched("objective.reference", count=2)),
    row("A", "expw (offset switch)",
        f"{AGES} --out runs/offset --set objective.logit_offset=self",
        changed("runs/plain", "objective.logit_offset")),
    row("A", "rbf, gaussian, cauchy kernels",
        f"{AGES_GRID} --out runs/kernels {ALL_REPEL} --set objective.reference=barbano "
        "--choose objective.kernel=rbf,gaussian,cauchy",
        searched("objective.kernel", count=3)),
    row("A", "anchor/pooled normaliser",
        f"{AGES} --out runs/pooled --set objective.normalise=total",
        changed("runs/plain", "objective.normalise")),
    row("A", "neighbour mask: cosine, L1, L2, L∞",
        f"{AGES_GRID} --out runs/metrics --set objective.neighbours.shape=linear --set objective.neighbours.start=0.4 "
        "--set objective.neighbours.end=0.2 --choose objective.neighbours.metric=cosine,manhattan,euclidean,chebyshev",
        # Projections have length 1, where cosine and L2 are the same order.
        searched("objective.neighbours.metric", count=4, alike=1)),
    row("A", "dynamic k schedule",
        f"train cohorts/ages {small(6)} --out runs/schedule --set objective.neighbours.step=1 "
        "--set objective.neighbours.end=0.5",
        falls("neighbours")),
    row("A", "Rank-N-Contrast; L1/MSE baselines",
        f"{AGES_GRID} --out runs/baselines --choose objective.name=rank_n_contrast,l1,mse",
        searched("objective.name", count=3)),
    row("A", "Adam/SGD; step/cosine/warm-up",
        f"train cohorts/ages {small(4)} {ALL_REPEL} --out runs/sgd --set optimiser.name=sgd --set optimiser.warmup=0.5 "
        "--set optimiser.decay.shape=cosine --set optimiser.decay.start=1.0 --set optimiser.decay.end=0.1",
        changed("runs/plain", "optimiser", "training.epochs"),
        # It rises from 1 % in two epochs, and a cosine falls.
        values("history.csv", "learning_rate / 1e-4", 0.0087, 0.2778, 0.2318, 0.1)),
    row("A", "AMP, clipping, checkpoint, resume",
        "resume runs/killed",
        holds(facts.is_continued), holds(facts.is_clipped), made="runs/killed/history.csv",
        lacks="AMP needs a GPU, where training.precision=auto turns it on; on a CPU it is refused"),
    row("A", "initialise from pre-training",
        f"{AGES} --out runs/begun --set begin.weights=runs/pretrained",
        changed("runs/plain", "begin.weights"), says("into the encoder: ")),
    row("A", "ridge probe, MAE",
        f"{AGES} --out runs/plain",
        columns("cells.csv", "mae"), holds(facts.probe_reads(128))),
    row("A", "site BAcc and L_c",
        f"{AGES} --out runs/challenge --set evaluation.reference=dynlocrep",
        values("cells.csv", "openbhb_score - site_balanced_accuracy ** 0.3 * mae", 0)),
    row("A", "YAML launcher with overrides",
        f"train cohorts/ages --settings files/launcher.yaml --out runs/launched {small()} --set objective.width=5",
        setting("objective.name", "y_aware"), setting("training.batch_size", 12), setting("objective.width", 5.0)),
    row("A", "stand-alone evaluator; optional tracking",
        "evaluate runs/searched cohorts/others",
        values("*.csv", "gap - predicted + age", 0), exists("../tensorboard/*/events*"),
        made="runs/searched/evaluations"),

    row("B", "NIfTI I/O, mask z-score",
        "ingest sources/masked cohorts/masked --channels T1w --mask mask --spacing 8 --intensity zscore",
        holds(facts.is_z_scored)),
    row("B", "centre-preserving resample by spacing and size",
        "ingest sources/people cohorts/resampled --channels T1w --maps dseg --spacing 6 --shape 32,36,32 "
        "--interpolation bspline",
        holds(facts.is_centred)),
    row("B", "slice viewer, cohort plots",
        "quality cohorts/tissue",
        page("", 'alt="Slices of sub-0001', 'alt="Slices of sub-0016', "Intensities", "Measures by site", "<svg"),
        made="cohorts/tissue/quality.html"),
    row("B", "anisotropic 3-D ResUNet",
        f"train cohorts/tissue --space tissue {quarter()} --out runs/res-unet --set model.name=res_unet "
        "--set objective.name=dice",
        weight(r"\.up\.", 4, 4, 1), columns("cells.csv", "dice")),
    row("B", "3-D ResNeXt-50–200, shortcut A/B",
        f"sweep cohorts/others {GRID} {quarter(1)} --out runs/resnexts --set objective.name=l1 "
        "--set model.cardinality=8 --choose model.name=resnext50,resnext101,resnext152,resnext200 "
        "--choose model.shortcut=A,B",
        searched("model.name", "model.shortcut", count=8)),
    row("B", "cross-entropy segmentation trainer",
        f"train cohorts/tissue --space tissue {quarter(4)} --out runs/segmented",
        setting("objective.name", "cross_entropy"), falls("loss"), columns("cells.csv", "dice")),
    row("B", "per-class Dice, box plots",
        f"sweep cohorts/tissue --space tissue --out runs/boxes --trials 1 --slots 1 {quarter()}",
        columns("cells.csv", "dice_csf", "dice_gm", "dice_wm"),
        page("report.html", 'id="figure-overlap"', "Boxes: median and quartiles")),
    row("B", "save predictions with geometry",
        f"predict runs/segmented {SCAN} --out predicted/tissue",
        holds(facts.is_on_grid_of(SCAN))),
    row("B", "absolute/relative tissue volumes",
        "derive cohorts/people --from runs/segmented --volumes --name predicted",
        holds(facts.has_shares), made="cohorts/people/derived/predicted"),
    row("B", "linear, Bayesian, polynomial regressors",
        f"sweep cohorts/tissue --task tissue_age {GRID} --folds 2 --out runs/regressors --set training.epochs=1 "
        "--choose regressor.name=linear,bayesian_ridge --choose regressor.degree=1,3",
        searched("regressor.name", "regressor.degree", count=4)),
    row("B", "direct CNN regression",
        f"train cohorts/others --space cnn_age {quarter()} --out runs/cnn --set model.cardinality=8",
        columns("cells.csv", *SIX), weight(r"^head\.layer\.weight", 1, 512)),
    row("B", "CV + hold-out report, six metrics, scatter",
        "sweep cohorts/tissue --space tissue_age --out runs/by-volumes --trials 1 --folds 2 --slots 1 "
        "--set regressor.degree=1",
        columns("cells.csv", *SIX), columns("holdout.csv", *SIX),
        page("report.html", 'id="figure-predicted"', 'id="figure-volumes"')),

    row("C", "fold JSON reader with leak check",
        "ingest sources/folds/folds.json cohorts/folds --layout decathlon --spacing 8",
        values(MANIFEST, "fold", 0, 2, 0, 1, 1, 2), says("LEAK: 1 subjects are in more than one fold or list: a (")),
    row("C", "midline alignment hook",
        "ingest sources/tilted cohorts/upright --channels T1w --spacing 8 --midline",
        values(MANIFEST, "midline_angle", TILT, tolerance=1),
        values(MANIFEST, "midline_residual_angle", 0, tolerance=1)),
    row("C", "mirrored crop sampler (patch/whole, labels)",
        f"train cohorts/lesions --space symmetry_segmentation {quarter()} --out runs/mirrored --set data.target=lesion "
        "--set views.crop_on_class=0 --set views.crop_size=16 --set views.pad_to=16",
        changed("runs/whole", "views.crop_size", "views.pad_to"), columns("cells.csv", "dice_lesion"),
        weight(r"attention\.")),
    row("C", "modality intensity presets",
        "ingest sources/ct cohorts/window --channels ct --spacing 8 --intensity window:ct_brain",
        holds(facts.reaches(1, 23, 28, 23)), page("cohort.json", "window:0,80")),
    row("C", "quarter-turn rotation task",
        f"{PRETEXT} --out runs/rotation {NO_CONTRAST} {NO_INPAINTING} {NO_SYMMETRY}",
        only("rotation"), weight(r"heads\.rotation\..*weight", 4, 192)),
    row("C", "patch drop/swap inpainting task",
        f"{PRETEXT} --out runs/inpainting {NO_ROTATION} {NO_CONTRAST} {NO_SYMMETRY}",
        only("inpainting"), weight(r"decoder\.")),
    row("C", "NT-Xent task",
        f"{PRETEXT} --out runs/nt-xent {NO_ROTATION} {NO_INPAINTING} {NO_SYMMETRY} --set evaluation.probes=[disease]",
        only("contrast"), setting("objective.contrast.temperature", 0.5)),
    row("C", "symmetry losses: BCE, siamese, group, margin",
        f"sweep cohorts/lesions --task symmetry_pretraining {GRID} {quarter()} --out runs/symmetry {NO_ROTATION} "
        f"{NO_CONTRAST} {NO_INPAINTING} --set model.name=swin --set data.diagnosis=disease "
        "--choose objective.symmetry.form=cosine_nce,siamese,group,margin",
        searched("objective.symmetry.form", count=4)),
    row("C", "task weights/switches",
        f"{PRETEXT} --out runs/mixture {NO_CONTRAST} --set objective.rotation.weight=2 "
        "--set objective.symmetry.weight=0.5 --set objective.inpainting.weight=0",
        values("history.csv", "loss - 2 * rotation - 0.5 * symmetry", 0),
        columns("history.csv", "rotation", "symmetry")),
    row("C", "3-D Swin, gradient checkpointing",
        f"{UNWEIGHTED} --out runs/checkpointing --set model.name=swin --set model.checkpointing=true",
        weight(r"layers4.*qkv\.weight"), same_losses("runs/swin", 1e-4)),
    row("C", "SACA block",
        f"{UNWEIGHTED} --out runs/saca --set model.name=swin_symmetry --set model.layers=2",
        weight(r"encoder\.attention\.layers\.1\.")),
    row("C", "plain and SACA classifiers",
        f"sweep cohorts/lesions --task classification {GRID} {quarter()} --out runs/classifiers "
        "--set data.target=disease --choose model.name=swin,swin_symmetry",
        searched("model.name", count=2), columns("cells.csv", "macro_auc")),
    row("C", "SwinUNETR and SACA-UNETR",
        f"sweep cohorts/lesions --task segmentation {GRID} {quarter()} --out runs/unetrs "
        "--set data.target=lesion --set data.classes=[lesion=1] --choose model.name=swin_unetr,swin_unetr_symmetry",
        searched("model.name", count=2)),
    row("C", "reconstruction decoders: vae, deconv, large kernel",
        f"sweep cohorts/wide --task masked_pretraining {GRID} {quarter()} --out runs/decoders "
        "--set model.name=resnet18 --choose decoder.kind=interpolated,transposed,large_kernel",
        searched("decoder.kind", count=3)),
    row("C", "weighted CE, macro AUC",
        f"{CLASSES} --out runs/weighted --set model.name=swin --set objective.class_weights=balanced",
        changed("runs/swin", "objective.class_weights"), columns("cells.csv", "macro_auc")),
    row("C", "soft/squared Dice, BraTS regions",
        f"sweep cohorts/contrasts --task segmentation {GRID} {quarter()} --out runs/regions "
        "--set data.classes=brats2021 --set objective.name=dice --choose objective.squared=false,true",
        searched("objective.squared", count=2), columns("cells.csv", *REGIONS)),
    row("C", "mirror-aware sliding window, label export",
        f"predict runs/mirrored {SCAN} --out predicted/mirrored",
        holds(facts.is_on_grid_of(SCAN))),
    row("C", "per-case JSON; embedding/zero-shot export",
        f"predict runs/mixture {SCAN} --out predicted/cases.json --embeddings predicted/embeddings.parquet",
        columns("", "asymmetry"), holds(facts.has_embeddings)),
    row("C", "warm-up cosine by epoch/step; poly",
        f"{AGES} --out runs/poly --set training.batch_size=4 --set training.steps=12 --set training.judge_every=3 "
        "--set optimiser.warmup=0.5 --set optimiser.decay.shape=polynomial --set optimiser.decay.start=1.0",
        # It rises with every step of two thirds, and the power 0.9 falls.
        values("history.csv", "learning_rate / 1e-4", 0.2625, 0.4475, 0.2872, 0.0)),
    row("C", "partial state loading",
        f"{UNWEIGHTED} --out runs/partial --set model.name=swin --set begin.weights=files/foreign.pt "
        "--set begin.rename=[theirs.=encoder.] --set begin.freeze=encoder",
        holds(facts.encoder_is_kept("theirs.", "encoder.")), says("foreign#")),
    row("C", "multi-GPU, caching datasets",
        f"{AGES} --out runs/two-workers --workers 2 --data-mode resident",
        same_losses("runs/plain", 1e-3),
        lacks="NCCL is for GPUs: here both workers of a batch speak by gloo, on CPUs"),

    row("D", "multi-contrast loading, stretch, crop",
        "ingest sources/cases cohorts/cases --layout cases --channels t1n,t1c,t2w,t2f --spacing 8 --shape 20,20,20 "
        "--intensity percentile:0.01,99.9",
        holds(facts.reaches(4, 20, 20, 20))),
    row("D", "PCA–TV–k-means constraint maps",
        "derive cohorts/contrasts --constraint tissue --components 4 --tv 40 --clusters 20",
        holds(facts.has_clusters), made=CLUSTERS),
    row("D", "HDF5 writer/reader",
        "ingest sources/people cohorts/hdf5 --channels T1w --maps dseg --spacing 8 --format hdf5 --compression gzip",
        holds(facts.is_read_by_h5py)),
    row("D", "patch-majority targets, foreground anchors",
        f"{CONTRAST} {quarter()} --out runs/patches --set objective.patch=4 --set objective.anchors=5",
        changed("runs/contrast", "objective.patch", "objective.anchors"), columns("history.csv", "anchors_used"),
        needs=(CLUSTERS,)),
    row("D", "2-D GroupNorm U-Net",
        f"{TUMOURS} --out runs/unet-2d {UNCHANGED}",
        weight(r"encoder\.stages\.", 4, 4, 3, 3), no_weight("running_mean"), columns("cells.csv", "dice")),
    row("D", "partial/full decoder, dense and global heads",
        f"{CONTRAST} {quarter()} --out runs/heads --set features.levels=5 --set warm_start.share=0.5",
        changed("runs/contrast", "features.levels", "warm_start"), weight(r"^decoder\.up\.4\."),
        weight(r"^head\."), weight(r"^vector\."), needs=(CLUSTERS,)),
    row("D", "warm start, named transfer, encoder freeze",
        f"{TUMOURS} --out runs/transfer {UNCHANGED} --splits-from runs/contrast "
        "--set begin.weights=runs/contrast --set begin.freeze=encoder",
        holds(facts.encoder_is_kept("encoder.", "network.encoder.")), says("into the encoder and decoder: ")),
    row("D", "CCL pairwise and set-wise",
        f"sweep cohorts/contrasts --task contrast_pretraining {GRID} {quarter()} --out runs/forms "
        "--set data.constraint=tissue --choose objective.form=pairwise,setwise",
        searched("objective.form", count=2), needs=(CLUSTERS,)),
    row("D", "SimCLR; anatomical negatives; partition sampler",
        f"sweep cohorts/contrasts --task contrast_pretraining {GRID} {quarter()} --out runs/global "
        "--set slices.count=3 --set evaluation.probes=[age] --choose objective.name=simclr,anatomical",
        searched("objective.name", count=2)),
    row("D", "plateau schedule, CSV log, config dump",
        f"{CONTRAST} {quarter(4)} --out runs/plateau --set optimiser.plateau.patience=0 "
        "--set optimiser.plateau.threshold=0.99",
        falls("learning_rate"),
        page("best/settings.json", '"factor": 0.5', '"patience": 0'), needs=(CLUSTERS,)),
    row("D", "Tversky fine-tuning",
        f"{TUMOURS} --out runs/tversky {UNCHANGED} --set objective.alpha=0.7",
        changed("runs/unet-2d", "objective.alpha"), columns("cells.csv", *REGIONS)),
    row("D", "paired affine augmentation",
        f"{TUMOURS} --out runs/augmented",
        changed("runs/unet-2d", "views"), columns("cells.csv", *REGIONS)),
    row("D", "label-budget curves",
        f"sweep cohorts/ages --space label_budget --out runs/labels --labelled 4,8 --refit-seeds 3 --trials 1 "
        f"--slots 1 {small()}",
        columns("curve.csv", "value"), exists("labelled-4/report.html"), exists("labelled-8/report.html"),
        page("report.html", 'id="figure-curve"')),

    row("all", "conditional hyper-parameter search",
        f"sweep cohorts/ages --out runs/conditional --sampler random --trials 6 --slots 1 --scheduler none {small()}",
        holds(facts.is_conditional)),
)  # fmt: skip
"""In the order of the specification."""
