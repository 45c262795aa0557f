"""The verbs of `cmrhpc`. Each reads its arguments, calls one function, and prints; imports wait until a verb runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrhpc.arguments import SECTIONS, STAGES, TYPED, parser
from cmrhpc.errors import (
    EXIT_CLOSED_PIPE,
    EXIT_INTERRUPTED,
    BadInput,
    Checkpointed,
    Damage,
    Incomplete,
    UsageError,
    explained,
    printable,
)
from cmrhpc.near import did_you_mean
from cmrhpc.output import lossy
from cmrhpc.signals import Stopped, held, stopping_at_once

if TYPE_CHECKING:
    from cmrhpc.stages.task import StopRequest


def _say(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value) if as_json else text, flush=True)


# ------------------------------------------------------------------------------------------------ the verbs


def phantom(args: argparse.Namespace) -> int:
    from cmrhpc.data.phantom import write_phantom

    write_phantom(Path(args.raw), args.patients, args.seed)
    print(f"{args.raw}: simulated native-T1 cohort of {args.patients} patients; table cohort.csv")
    return 0


def init(args: argparse.Namespace) -> int:
    from cmrhpc.init import make_workspace

    columns = dict(_pair(text) for text in args.column)
    made = make_workspace(
        Path(args.workspace),
        args.study,
        Path(args.raw),
        args.table,
        columns,
        args.spacing,
        args.channels,
        args.positive,
    )
    study = made.study
    print(f'{args.workspace}/study.toml: study "{study.name}"; classes: {made.classes}')
    if len(study.classes) == 2:
        print(f"positive class: {study.classes[1]}")
    for line in made.notes:
        print(line)
    print(f"next: read {args.workspace}/study.toml, then `cmrhpc ingest {shlex.quote(args.workspace)}`")
    return 0


def ingest(args: argparse.Namespace) -> int:
    _run_task(args.workspace, "ingest", 0)
    place = shlex.quote(args.workspace)
    print(f"next: look at {args.workspace}/cohort.png and cohort.csv,")
    print(f"      then `cmrhpc run {place}`, or on a cluster `cmrhpc submit {place} --profile P`")
    return 0


def plan(args: argparse.Namespace) -> int:
    from cmrhpc.launch.planned import print_plan, print_ranges
    from cmrhpc.workspace import Workspace

    workspace = Workspace(args.workspace)
    example = "cmrhpc plan WS --stage synthesize --array"
    if (args.array or args.offset or args.chunk) and not (args.array and args.stage):
        raise UsageError("--offset and --chunk need --array, and --array needs --stage", "", example)
    if args.array and (args.json or args.why):
        raise UsageError("--array prints for sbatch; --json and --why do not apply to it", "", "give one of them")
    if args.array:
        print_ranges(workspace, args.stage, args.chunk or 0, args.offset)
    else:
        print_plan(workspace, (args.stage,) if args.stage else STAGES, args.json, args.why or bool(args.stage))
    return 0


def task(args: argparse.Namespace) -> int:
    _run_task(args.workspace, args.stage, args.index)
    return 0


def _run_task(root: str, stage: str, given: int | None) -> None:
    """Run one task with its log and record, and print what happened."""
    with held():  # an interrupted import prints a traceback of its own
        from cmrhpc.launch import records
        from cmrhpc.launch.display import lines_of_one_task
        from cmrhpc.launch.logs import to_log_too
        from cmrhpc.stages.task import StopRequest, find_task, run_task, stop_on_signals
        from cmrhpc.workspace import Workspace

    workspace = Workspace(root)
    index = _array_index(given, stage)
    request = StopRequest()
    with stop_on_signals(request):
        find_task(workspace, stage, index)  # one that is not there leaves neither log nor record
        try:
            with to_log_too(workspace, stage, index) as note:
                records.write_record(workspace, stage, index, records.RUNNING)
                message = run_task(workspace, stage, index, lines_of_one_task(), _asked_to_stop(stage, request))
                records.write_record(workspace, stage, index, records.DONE, message)
                note(f"{message}\n")
        except Checkpointed as error:
            records.write_record(workspace, stage, index, records.STOPPED, error.what)
            if request.number == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise
        except Exception as error:
            told = explained(error)
            state = records.DONE if told.kept else records.FAILED
            records.write_record(workspace, stage, index, state, str(told))
            raise
    print(message)


def _asked_to_stop(stage: str, request: StopRequest) -> Callable[[], bool]:
    """Whether a task is to stop.

    Ingest has no checkpoint, so under Slurm it ignores the warning signal and runs until its time limit; the next
    submission asks for more time.
    """
    if stage == "ingest" and os.environ.get("SLURM_JOB_ID"):
        return lambda: request.number not in (0, signal.SIGUSR1, signal.SIGUSR2)
    return request


def run(args: argparse.Namespace) -> int:
    with held():  # an interrupted import prints a traceback of its own
        from cmrhpc import gpus
        from cmrhpc.launch.local import run as run_all
        from cmrhpc.stages.aggregate import fault_of_the_last
        from cmrhpc.workspace import Workspace

    workspace = Workspace(args.workspace)
    threads = workspace.study.compute.threads
    jobs = args.jobs or gpus.tasks_at_once(threads)
    if args.jobs and jobs * threads > gpus.cores():  # threads that wait for each other at every operation
        crowded = f"! --jobs {jobs} starts {jobs * threads} threads, which slow each other down on {gpus.cores()} cores"
        print(f"{crowded}: --jobs {gpus.tasks_on_cores(threads)} is quicker", file=sys.stderr)
    summary = run_all(workspace, jobs, args.plain)
    if not (summary.done or summary.failed or summary.missing or summary.stopped):
        print(f"nothing to do: all {summary.already} tasks are done")
    table = workspace.path("report/table.md")
    if table.is_file() and not summary.stopped_by:
        from cmrhpc.report.aggregate import terminal_table

        print(f"\n{terminal_table(workspace.root)}")
        print(f"report page: {workspace.path('report/index.html')}")
    if summary.stopped_by:
        interrupted = summary.stopped_by == signal.SIGINT
        word = "interrupted" if interrupted else "stopped on request"
        print(f"{word}: what was finished is kept; `cmrhpc run` goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED if interrupted else Checkpointed.exit_code
    if summary.failed or summary.missing or summary.stopped:
        from cmrhpc.launch.failures import told

        mend = "mend each cause, then run the same command again: what is done is kept"
        what = told(summary.failed, summary.missing, summary.stopped)
        raise (Damage if summary.damage else Incomplete)(what, "", mend)
    if wrong := fault_of_the_last(workspace):  # also where it was up to date
        raise wrong
    return 0


def submit(args: argparse.Namespace) -> int:
    from cmrhpc.launch.verb import submit as submit_missing

    return submit_missing(args.workspace, args.profile, args.dry_run, args.yes, args.json)


def status(args: argparse.Namespace) -> int:
    from cmrhpc.launch.show import print_status, watch

    if args.watch and args.json:
        raise UsageError("--watch is for people, --json for scripts", "", "give one of them")
    return watch(args.workspace) if args.watch else print_status(args.workspace, args.json)


def aggregate(args: argparse.Namespace) -> int:
    from cmrhpc.report.aggregate import terminal_table
    from cmrhpc.stages.aggregate import aggregate_folder, fault

    root = Path(args.workspace)
    result = aggregate_folder(root)
    print(terminal_table(root))
    print(f"report page: {root.absolute() / 'report' / 'index.html'}")
    if wrong := fault(result, root):
        raise wrong
    return 0


def verify(args: argparse.Namespace) -> int:
    from cmrhpc.verify import verify as check
    from cmrhpc.workspace import Workspace

    workspace = Workspace(args.workspace)
    result = check(workspace)
    if args.json:
        keys = ("digest", "damaged", "leaks", "leaks_unchecked", "out_of_date", "missing")
        print(json.dumps({key: getattr(result, key) for key in keys}))
    elif result.shards or result.damaged:
        for line in result.damaged + result.leaks + result.out_of_date:
            print(printable(line))
        print(f"{result.files} files and {result.shards} shards checked; {result.missing} tasks are not done yet")
        if result.leaks_unchecked:
            print(f"leaks could not be looked for: {result.leaks_unchecked}")
        elif not result.leaks:
            by_image = workspace.study.folds.group_by == "image"
            note = '; patients are, as group_by = "image" asks' if by_image else ""
            note += "; damaged shards were not looked at" if result.damaged else ""
            print(f"no {'image' if by_image else 'patient'} is in training and in test of the same fold{note}")
        print(f"digest {result.digest}")
    if result.damaged or result.leaks:
        if args.json:
            return Damage.exit_code
        what = f"{len(result.damaged)} damaged, {len(result.leaks)} leaks"
        mend = "`cmrhpc run` (or submit) makes the damaged part again; a leak needs its cause mended"
        raise Damage(what, args.workspace, mend)
    if not result.shards:
        what = f"nothing to verify: no task is done yet, {result.missing} are missing"
        raise Incomplete(what, args.workspace, "`cmrhpc run` (or submit) makes the study")
    if result.out_of_date:
        if args.json:
            return Incomplete.exit_code
        what = "nothing is damaged, but the report is out of date"
        raise Incomplete(what, args.workspace, "`cmrhpc run` (or aggregate) makes it again")
    if result.leaks_unchecked:
        if args.json:
            return Incomplete.exit_code
        what = f"nothing is damaged, but leaks could not be looked for: {result.leaks_unchecked}"
        raise Incomplete(what, args.workspace, "`cmrhpc ingest` makes cohort and folds, `cmrhpc run` the rest")
    return 0


def export(args: argparse.Namespace) -> int:
    from cmrhpc.data.export import export as write_images

    more = {"by_fold": args.by_fold, "unit_scale": args.unit_scale}
    count = write_images(Path(args.workspace), args.shard, Path(args.to), args.format, args.limit, **more)
    print(f"{args.to}: {count} images")
    return 0


def doctor(args: argparse.Namespace) -> int:
    from cmrhpc.doctor import findings
    from cmrhpc.findings import broken

    profile = None
    if args.profile:
        from cmrhpc.profile import load_profile

        profile = load_profile(args.profile)
    found = findings(Path(args.workspace) if args.workspace else None, profile)
    lines = []
    for finding in found:
        lines.append(f"{'ok  ' if finding['ok'] else 'MEND' if finding['needed'] else 'note'} {finding['what']}")
        lines += [f"     {finding['mend']}"] if finding["mend"] and not finding["ok"] else []
    _say({"findings": found}, args.json, "\n".join(lines))
    wrong = broken(found)
    if wrong and not args.json:
        what = f"{len(wrong)} finding{'s' * (len(wrong) > 1)} to mend before this can work"
        raise BadInput(what, wrong[0]["what"], "each MEND above says how; a note only matters where its words apply")
    return BadInput.exit_code if wrong else 0


def bench(args: argparse.Namespace) -> int:
    from cmrhpc.bench.run import bench as measure
    from cmrhpc.gpus import cores

    only = [word for word in (args.only or "").split(",") if word]
    for word in only:
        if word not in SECTIONS:
            near = did_you_mean(word, SECTIONS, TYPED)
            raise UsageError(f'unknown section "{word}"', "--only", f"{near}there are {', '.join(SECTIONS)}")

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    threads = args.threads or min(2, cores())
    found = measure(only, args.quick, threads, args.tasks, args.images, args.workspace or "", args.profile or "", say)
    if args.json:
        print(json.dumps(found))
    return 0


# ------------------------------------------------------------------------------------------------ reading arguments


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise UsageError(f'"{text}" is not OURS=THEIRS', "--column", "for example --column patient=subject")
    return name, value


def _array_index(given: int | None, stage: str) -> int:
    if given is not None:
        return given
    if stage in ("ingest", "aggregate"):
        return 0
    text = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not text.isdigit():
        raise UsageError("which task?", f"stage {stage}", "give --index I, or run in a Slurm array")
    offset = os.environ.get("CMRHPC_OFFSET") or "0"
    if not offset.isdigit():
        raise UsageError(f'"{offset}" is not a number', "CMRHPC_OFFSET", "set it to what `cmrhpc plan --offset` prints")
    return int(text) + int(offset)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "phantom": phantom,
    "init": init,
    "ingest": ingest,
    "plan": plan,
    "task": task,
    "run": run,
    "submit": submit,
    "status": status,
    "aggregate": aggregate,
    "verify": verify,
    "export": export,
    "bench": bench,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2, 3, 4, 5, 75, 130 or 141. One message on stderr."""
    is_script = arguments is None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name that is not text is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with lossy() as lost:
            code = _run_verb(given, is_script)
            for stream in filter(None, (sys.stdout, sys.stderr)):  # where a closed pipe can still be told
                stream.flush()
            if lost and not code and given[:1] not in (["task"], ["run"]):  # their results are shards, and are kept
                told = BadInput(f"the output is not complete: {lost[0].strerror}", "", "free space where it goes")
                print(f"cmrhpc: {told}", file=sys.stderr)
                return told.exit_code
            return code
    except BrokenPipeError:
        if is_script:
            for number in (1, 2):  # so that nothing is written at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return EXIT_CLOSED_PIPE


def _run_verb(arguments: list[str], is_script: bool) -> int:
    debug = "--debug" in arguments
    try:
        with stopping_at_once(to_the_end=is_script):
            args = parser().parse_args(arguments)
            return VERBS[args.verb](args)
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Stopped:
        print("stopped on request: run the same command again", file=sys.stderr)
        return Checkpointed.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        told = explained(error)
        # What `task` says goes to a log of the workspace.
        print(f"cmrhpc: {told if arguments[:1] == ['task'] else told.for_a_person()}", file=sys.stderr)
        return told.exit_code


def job(stage: str) -> None:
    """What `python jobs/STAGE.py WORKSPACE [--index I]` calls: the same as `cmrhpc task`."""
    arguments = sys.argv[1:]
    sys.exit(main(["task", *arguments, "--stage", stage]))


if __name__ == "__main__":
    sys.exit(main())
