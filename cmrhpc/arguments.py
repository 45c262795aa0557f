"""What the verbs of `cmrhpc` take: every argument with its help and every verb with an example. Starts fast."""

from __future__ import annotations

import argparse
import re
from typing import Any

from cmrhpc.errors import UsageError
from cmrhpc.names import STAGES
from cmrhpc.near import did_you_mean

SECTIONS = ("generation", "classifier", "overhead", "shards", "ingest", "tasks", "gpu", "predict")  # of bench
PROFILE = "a file, or its name if it lies in slurm/profiles or ~/.config/cmrhpc/profiles"

TYPED = 0.7  # similarity cutoff for suggesting a word


def _one_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 up")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as the other errors do, and which verb, choice or option may have been meant."""

    def error(self, message: str) -> Any:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = did_you_mean(wrong[1], re.split("[', ]+", wrong[2]), TYPED) if wrong else ""
        raise UsageError(message, self.prog, f"{near}`{self.prog} --help` shows an example")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # each verb's own arguments as well
        first = args[0] if args and " " not in self.prog else ""
        if first.startswith("-") and first not in self._option_string_actions:
            mend = f"options come after the verb: {self.prog} VERB ... {first}"
            raise UsageError(f"{first} stands before the verb", self.prog, mend)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            near = did_you_mean(rest[0].partition("=")[0], self._option_string_actions, TYPED)
            mend = f"{near}`{self.prog} --help` lists what it takes"
            raise UsageError(f"unrecognized arguments: {' '.join(rest)}", self.prog, mend)
        return found, rest


def parser() -> argparse.ArgumentParser:
    """All verbs with their arguments and examples."""
    top = _Parser(
        prog="cmrhpc", description="GAN data augmentation of small medical-image sets: does it help, how much?"
    )
    from cmrhpc import __version__

    top.add_argument("--version", action="version", version=f"cmrhpc {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, text: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        return made

    p = verb(
        "phantom",
        "write a simulated native-T1 cohort as a raw folder",
        "cmrhpc phantom raw --patients 40 --seed 1",
    )
    p.add_argument("raw", metavar="RAW", help="new folder")
    p.add_argument("--patients", type=int, default=40, metavar="N")
    p.add_argument("--seed", type=int, default=0, metavar="S")

    p = verb("init", "make a workspace with an editable study.toml", "cmrhpc init ws --study demo --raw raw")
    p.add_argument("workspace", metavar="WORKSPACE", help="a folder without a study.toml, or a new one")
    p.add_argument("--study", required=True, metavar="NAME_OR_TOML", help="a shipped study (demo, fu2021) or a file")
    p.add_argument("--raw", required=True, metavar="RAW", help="raw folder with images and their table")
    p.add_argument("--table", default=None, metavar="FILE", help="table in the raw folder (default cohort.csv)")
    p.add_argument(
        "--column", action="append", default=[], metavar="OURS=THEIRS", help="map a column, e.g. patient=subject"
    )
    p.add_argument("--spacing", type=float, default=None, metavar="MM", help="pixel spacing of files that hold none")
    p.add_argument("--channels", type=int, default=None, choices=(1, 3))
    p.add_argument("--positive", default=None, metavar="LABEL", help="the positive class of a binary study")

    p = verb("ingest", "raw folder -> cohort and folds", "cmrhpc ingest ws")
    p.add_argument("workspace", metavar="WORKSPACE")

    p = verb("plan", "the tasks, what is done, what is missing and why", "cmrhpc plan ws --stage synthesize --array")
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument("--stage", choices=STAGES)
    p.add_argument("--array", action="store_true", help="print the missing indices for sbatch --array")
    p.add_argument("--chunk", type=_one_or_more, metavar="N", help="at most N tasks per line of --array")
    p.add_argument(
        "--offset", action="store_true", help="with --array, lines RANGE OFFSET: for indices that the cluster refuses"
    )
    p.add_argument("--why", action="store_true", help="list every task with its reason (as with --stage)")
    p.add_argument("--json", action="store_true")

    p = verb("task", "run one task", "cmrhpc task ws --stage synthesize --index 0")
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument("--stage", required=True, choices=STAGES)
    p.add_argument("--index", type=int, default=None, metavar="I", help="default: SLURM_ARRAY_TASK_ID")

    p = verb("run", "everything missing, on this machine", "cmrhpc run ws --jobs 2")
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument(
        "--jobs",
        type=_one_or_more,
        metavar="N",
        help="tasks at once (default: one per GPU; without any: cores / threads per task)",
    )
    p.add_argument("--plain", action="store_true", help="plain lines instead of bars")

    p = verb("submit", "everything missing, on Slurm through submitit", "cmrhpc submit ws --profile mycluster")
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument("--profile", required=True, metavar="P", help=PROFILE)
    p.add_argument("--dry-run", action="store_true", help="print the sbatch files, checked by Slurm, and send nothing")
    p.add_argument("--yes", action="store_true", help="send without asking")
    p.add_argument("--json", action="store_true")

    p = verb("status", "done / running / waiting / failed per stage", "cmrhpc status ws --watch")
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument("--watch", action="store_true", help="look again every few seconds")
    p.add_argument("--json", action="store_true")

    p = verb("aggregate", "tables, figures and the report page; no torch, no cluster", "cmrhpc aggregate ws")
    p.add_argument("workspace", metavar="WORKSPACE", help="a workspace, or a folder with a copied predictions/")

    p = verb("verify", "re-hash every file, prove no leak, print one digest", "cmrhpc verify ws")
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument("--json", action="store_true")

    p = verb(
        "export",
        "images of a shard as .mha or .png",
        "cmrhpc export ws --shard cohort.h5 --to out --format mha",
    )
    p.add_argument("workspace", metavar="WORKSPACE")
    p.add_argument(
        "--shard",
        required=True,
        metavar="PATH",
        help="from the workspace, e.g. synthetic/dae-gan/fold0_repeat0_class1.h5, or the folder synthetic/dae-gan",
    )
    p.add_argument("--to", required=True, metavar="FOLDER", help="new or empty")
    p.add_argument("--format", choices=("mha", "png"), default="png")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="at most N images of a shard (0: all)")
    p.add_argument("--by-fold", action="store_true", help="of cohort.h5: the training images of every fold and class")
    p.add_argument("--unit-scale", action="store_true", help=".mha values stay on the scale from -1 to 1, bit for bit")

    p = verb("bench", "measure this machine against plain code, and predict a study's time", "cmrhpc bench ws --quick")
    p.add_argument("workspace", metavar="WORKSPACE", nargs="?", help="predict the stages of its study")
    p.add_argument(
        "--profile", metavar="P", help="hold the prediction (without WORKSPACE: of fu2021) against its limits"
    )
    p.add_argument("--quick", action="store_true", help="few rounds and few tasks")
    p.add_argument("--only", metavar="SECTIONS", help=f"of {','.join(SECTIONS)}")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: 2, or the cores there are")
    p.add_argument("--tasks", type=int, default=0, metavar="N", help="tasks of the made-up study (10,000; quick: 500)")
    p.add_argument("--images", type=int, default=0, metavar="N", help="images to ingest (3,000; quick: 200)")
    p.add_argument("--json", action="store_true")

    p = verb("doctor", "what is installed, which GPU, which Slurm, which container, what is missing", "cmrhpc doctor")
    p.add_argument("workspace", metavar="WORKSPACE", nargs="?", help="a folder, to look at its file system too")
    p.add_argument("--profile", default=None, metavar="P", help=PROFILE)
    p.add_argument("--json", action="store_true")
    return top
