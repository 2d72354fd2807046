"""Break the promises of a search on purpose, one at a time: does a test fail?

    python -m benchmarks.mutants

Each mutant is one small change of the code that would make a result dishonest: subjects who leak, a winner who is
chosen wrongly, an interval that is too narrow. The packages and the tests are copied to a temporary folder, the
mutant's text is replaced there, and its tests run. A mutant whose tests still pass has survived: the tests do not
hold the promise. Before the mutants, the same tests must pass on the code as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from core.errors import UserError

TREE = Path(__file__).resolve().parent.parent
COPIED = ("core", "distributed", "search_spaces", "tests", "pyproject.toml")
"""The parts of the working tree that the tests need."""
PASSED, FAILED = 0, 1
"""The exit codes of pytest for tests that ran; every other code means that they could not run."""


@dataclass(frozen=True)
class Mutant:
    """One broken promise: in `file`, the text `old` becomes `new`, and one of `tests` must fail.

    `file` contains `old` exactly once; after a change of the code this list must be renewed.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "the access line ignores fold 0",
        "core/report/answer/honesty.py",
        ".astype(float) >= 0",
        ".astype(float) >= 1",
        ("tests/test_report_search.py::test_access_records_say_who_read_the_hold_out",),
    ),
    Mutant(
        "ASHA compares after one epoch",
        "distributed/search/schedulers.py",
        "    grace, mode = max(1, epochs // 4), mode_of(better)",
        "    grace, mode = 1, mode_of(better)",
        (
            "tests/test_schedulers.py::test_asha_compares_at_a_quarter_and_a_half_of_the_first_cell_then_at_doublings",
        ),
    ),
    Mutant(
        "intensity statistics are fitted with the evaluation subjects",
        "distributed/training/cell_data.py",
        "moments(self.training_rows)",
        "moments(np.concatenate([self.training_rows, self.evaluation_rows]))",
        ("tests/test_leaks.py::test_the_intensity_statistics_are_those_of_the_training_voxels",),
    ),
    Mutant(
        "the probe is fitted with the evaluation subjects",
        "core/tasks/brain_age.py",
        "                training.embeddings, ages, training.subjects, penalty=judging.penalty, reference=published\n",
        "                np.concatenate([training.embeddings, evaluation.embeddings]),\n"
        "                np.concatenate([training.labels, evaluation.labels]),\n",
        ("tests/test_leaks.py::test_the_probe_and_its_penalty_depend_on_the_training_subjects_alone",),
    ),
    Mutant(
        "the penalty of the probe is chosen with the evaluation subjects",
        "core/tasks/brain_age.py",
        "                training.embeddings, ages, training.subjects, penalty=judging.penalty, reference=published\n",
        "                training.embeddings,\n"
        "                ages,\n"
        "                alphas=(\n"
        "                    fit_age_probe(\n"
        "                        np.concatenate([training.embeddings, evaluation.embeddings]),\n"
        "                        np.concatenate([training.labels, evaluation.labels]),\n"
        "                    ).alpha,\n"
        "                ),\n",
        ("tests/test_leaks.py::test_the_probe_and_its_penalty_depend_on_the_training_subjects_alone",),
    ),
    Mutant(
        "a cell gives its evaluation subjects to the probe",
        "distributed/training/loop.py",
        "training, evaluation = self._observe(fitted_on), self._observe(self.evaluation_rows)",
        "training, evaluation = (\n"
        "            self._observe(rows)\n"
        "            for rows in (np.concatenate([self.labelled_rows, self.evaluation_rows]), self.evaluation_rows)\n"
        "        )",
        ("tests/test_leaks.py::test_a_cell_judges_with_a_probe_of_its_training_subjects",),
    ),
    Mutant(
        "an interval of 80 % is called 95 %",
        "core/report/answer/verdict.py",
        "LEVEL = 0.95",
        "LEVEL = 0.8",
        ("tests/test_report.py::test_the_interval_of_one_comparison_is_the_studentised_one_of_its_gains",),
    ),
    Mutant(
        "comparisons that are made together are not corrected for",
        "core/report/answer/verdict.py",
        "level=1 - (1 - LEVEL) / family",
        "level=LEVEL",
        ("tests/test_report.py::test_comparisons_that_are_made_together_have_wider_intervals",),
    ),
    Mutant(
        "the scans of a person vouch for each other in the probe",
        "core/evaluation/probes.py",
        "(embeddings_nd - mean_d) / scale_d, subject_weights(subjects_n)",
        "(embeddings_nd - mean_d) / scale_d, subject_weights(np.arange(len(ages_n)).astype(str))",
        ("tests/test_probes.py::test_two_sessions_predict_new_people_no_worse_than_one",),
    ),
    Mutant(
        "the winner may be a trial that was stopped early, in the study",
        "distributed/search/study.py",
        "states=(TrialState.COMPLETE,)",
        "states=(TrialState.COMPLETE, TrialState.PRUNED)",
        ("tests/test_study.py::test_the_winner_is_the_best_completed_trial_inside_the_space",),
    ),
    Mutant(
        "the winner may be a trial that was stopped early, in the report",
        "core/report/answer/record.py",
        '(trials["state"] == "COMPLETE") & ',
        "",
        ("tests/test_report.py::test_the_winner_is_the_best_completed_trial_inside_the_space",),
    ),
    Mutant(
        "the winner may lie outside the space",
        "distributed/search/study.py",
        "min(within, ",
        "min(completed, ",
        ("tests/test_study.py::test_the_winner_is_the_best_completed_trial_inside_the_space",),
    ),
    Mutant(
        "a cell of the search trains on the hold-out",
        "distributed/training/subjects.py",
        "return self.splits.training(fold), ",
        "return np.union1d(self.splits.training(fold), self.splits.holdout), ",
        ("tests/test_leaks.py::test_no_cell_of_the_search_holds_a_held_out_subject",),
    ),
    Mutant(
        "a refit repeats a seed of the search",
        "distributed/sweeps/request.py",
        '"seed": self.seeds + index',
        '"seed": index',
        ("tests/test_request.py::test_cells_of_the_search_its_confirmation_and_the_refits_share_no_seed",),
    ),
    Mutant(
        "a trial that was stopped early is told as completed",
        "distributed/search/searcher.py",
        "tell(trial, state=TrialState.PRUNED)",
        "tell(trial, result[METRIC])",
        ("tests/test_search.py::test_stopped_early_is_pruned_with_all_its_intermediate_values",),
    ),
    Mutant(
        "the published trial may be stopped early",
        "distributed/search/searcher.py",
        "prunable = trial.user_attrs.get(LABEL) != PUBLISHED",
        "prunable = True",
        ("tests/test_search.py::test_only_the_published_trial_is_safe_from_pruning",),
    ),
    Mutant(
        "a refit looks at the hold-out in every epoch",
        "distributed/training/trial.py",
        "return not self.finished and not ",
        "return not self.finished or not ",
        ("tests/test_trial.py::test_a_refit_looks_at_the_hold_out_at_its_end_only",),
    ),
    Mutant(
        "bfloat16 is allowed on a CPU",
        "distributed/training/loop.py",
        'wanted == "bfloat16" and device.type == "cpu"',
        'wanted == "bfloat16" and device.type == "mps"',
        ("tests/test_trial.py::test_bfloat16_on_a_cpu_is_refused",),
    ),
    Mutant(
        "every worker has a batch norm of its own, and only the first one's is saved",
        "distributed/training/loop.py",
        "            synchronise_batch_norm(self.model, place.device)",
        "            pass",
        (
            "tests/test_several_workers.py::test_a_trial_of_two_workers_that_is_continued_ends_with_the_same_numbers",
        ),
    ),
    Mutant(
        "the prediction interval is not corrected for few people",
        "core/evaluation/calibration.py",
        "(len(np.unique(subjects_n)) + 1) * LEVEL",
        "len(np.unique(subjects_n)) * LEVEL",
        (
            "tests/test_calibration.py::test_half_of_the_interval_is_the_error_that_nine_of_ten_new_people_do_not_exceed",
        ),
    ),
    Mutant(
        "every scan counts as a person in the prediction interval",
        "core/evaluation/calibration.py",
        "    weights_n = subject_weights(subjects_n)\n    order",
        "    weights_n = None\n    order",
        ("tests/test_calibration.py::test_a_person_counts_once_with_all_scans_and_seeds",),
    ),
    Mutant(
        "held-out predictions enter the calibration",
        "distributed/sweeps/tables.py",
        'trial.glob("predictions-*-*.csv")',
        'trial.glob("predictions-*.csv")',
        (
            "tests/test_calibration.py::test_the_file_of_a_run_is_made_of_the_cells_of_the_trial_and_never_of_the_hold_out",
        ),
    ),
    Mutant(
        "predict calls a scan new whose training it cannot know",
        "distributed/commands/known_scans.py",
        'trained_on = "unknown" if unknown else "no"',
        'trained_on = "no"',
        ("tests/test_known_scans.py::test_what_cannot_be_compared_is_not_called_new",),
    ),
    Mutant(
        "the L1 baseline was tuned and is refitted untuned",
        "distributed/sweeps/refits.py",
        "untuned if tuned is None else",
        "untuned if True else",
        ("tests/test_baseline.py::test_the_refit_takes_the_best_trial_of_the_baseline",),
    ),
    Mutant(
        "the report says that the L1 baseline was tuned although none of its trials was completed",
        "core/report/answer/record.py",
        "self._best_of(self.baseline)",
        'self._best_of(self.baseline.assign(state="COMPLETE", value=9.0))',
        ("tests/test_baseline_report.py::test_the_report_says_how_the_baseline_was_tuned",),
    ),
    Mutant(
        "people have a part in the penalty for their own prediction",
        "core/tasks/penalties.py",
        "errors(part_of(training, folds != fold), evaluation)",
        "errors(training, evaluation)",
        ("tests/test_leaks.py::test_no_age_of_a_judged_person_has_a_part_in_the_prediction",),
    ),
    Mutant(
        "a budget may end with nothing after the published trial has failed",
        "distributed/search/study.py",
        "    if published or best_trial(study) is None:",
        "    if published:",
        (
            "tests/test_search.py::test_if_the_published_configuration_fails_the_first_of_the_others_is_completed",
        ),
    ),
    Mutant(
        "a scheduler may stop the only trial that has to be completed",
        "distributed/search/schedulers.py",
        "return name == budget.completes or (",
        "return (",
        ("tests/test_schedulers.py::test_the_trial_that_has_to_be_completed_is_compared_and_never_stopped",),
    ),
    Mutant(
        "what comes before the search is not part of its projected end",
        "distributed/search/budget.py",
        "seconds = self.elapsed + self.running_for + left * each",
        "seconds = self.running_for + left * each",
        ("tests/test_budget.py::test_everything_that_is_completed_in_any_case_is_counted",),
    ),
    Mutant(
        "the search of another winner is called the same look",
        "distributed/sweeps/looks.py",
        'update={"when": look.when})',
        'update={"when": look.when, "winner": winner})',
        ("tests/test_looks.py::test_another_winner_among_the_same_trials_is_another_look",),
    ),
    Mutant(
        "the pruner compares values after unequally many cells",
        "distributed/search/schedulers.py",
        "others = after_cells[len(values) - 1] if after_cells else",
        "others =",
        ("tests/test_schedulers.py::test_wilcoxon_compares_values_after_equally_many_cells",),
    ),
)


def mutated(mutant: Mutant, tree: Path = TREE) -> str:
    """The text of the file of a mutant in `tree`, with its change; UserError unless it has the old text once."""
    text = (tree / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise UserError(
            f"mutant '{mutant.name}': {mutant.file} holds the text {mutant.old!r} {found} times, and it must be once; "
            "renew the list in benchmarks/mutants.py"
        )
    return text.replace(mutant.old, mutant.new)


def main() -> int:
    """Run every mutant and print the result; returns 1 if one survived."""
    changed = [mutated(mutant) for mutant in MUTANTS]
    console = Console()
    table = Table("mutant", Column("killed by", overflow="fold"), "seconds")
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        copy = _copied(Path(name))
        failed = run_tests(copy, sorted({test for mutant in MUTANTS for test in mutant.tests}))
        if failed is not None:
            raise UserError(f"{failed} fails on the unchanged code; fix it first")
        for mutant, text in zip(MUTANTS, changed, strict=True):
            began = time.perf_counter()
            path = copy / mutant.file
            intact = path.read_text(encoding="utf-8")
            path.write_text(text, encoding="utf-8")
            killer = run_tests(copy, mutant.tests)
            path.write_text(intact, encoding="utf-8")
            survivors += killer is None
            table.add_row(mutant.name, killer or "SURVIVED", f"{time.perf_counter() - began:.1f}")
    console.print(table)
    console.print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants killed")
    return 1 if survivors else 0


def run_tests(tree: Path, tests: Sequence[str]) -> str | None:
    """Run `tests` of the packages in `tree`; returns the first one that fails, or None if all pass.

    Raises:
        UserError: the tests could not run, for example because a mutant is not valid Python.
    """
    # Without compiled files: Python would use an old one if a change keeps the size and the second of the file.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rf", "-p", "no:cacheprovider", *tests,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^FAILED (\S+)", done.stdout, flags=re.MULTILINE)
    if done.returncode == PASSED:
        return None
    if done.returncode != FAILED or failed is None:
        raise UserError(
            f"the tests {', '.join(tests)} could not run: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return failed[1]


def _copied(folder: Path) -> Path:
    """Copy the packages and tests of the working tree to `folder`, and return it."""
    for name in COPIED:
        source = TREE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
