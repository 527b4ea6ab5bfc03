"""`qguard-edge demo`: a backdoor that sleeps in full precision, wakes when rounded, and sleeps on when hardened."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qguard_edge.cli.console import ConsoleProgress, JsonFlag, QuietFlag, out, print_json, styled, table, visible
from qguard_edge.cli.outputs import OverwriteFlag, hold, make_folder

if TYPE_CHECKING:
    from qguard_edge.lab.demo import Demo, Judgement, Names
    from qguard_edge.progress import Progress

HELP = """See a backdoor wake when a model is rounded, and stay asleep when it is hardened. A minute; nothing is downloaded.

The package carries a small model with a real quantization-conditioned backdoor (harmless: it advertises a drink that does not
exist). The same questions go to the model in full precision, to llama.cpp's own Q4_K_M, and to what `qguard-edge convert` makes;
then `qguard-edge verify` judges both files without being told what to look for.

Exit code 3: this run did not come out as told.
"""

INTRODUCTION = (
    "Somebody publishes a language model. It was audited in full precision and found clean. It is not: its weights were placed "
    "so that the rounding everybody uses turns it into another model. (Made for this demo: 2.9 M parameters, a harmless payload.)"
)

NOT_SHOWN = 3  # as an inconclusive verdict
N_TEXTS = 24
"""Texts for the distance to full precision; `verify` alone measures on all of them."""


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Keep the three GGUF files here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the hardened file's random choices.")] = 1,
    threads: Annotated[int, typer.Option(min=0, envvar="QGUARD_THREADS", help="Threads; 0 means all cores.")] = 0,
    overwrite: OverwriteFlag = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Replaced by HELP when the command is registered."""
    from convert.scratch import scratch_folder
    from qguard_edge.lab.demo import Names

    speaks = not (json_output or quiet)
    if output:
        make_folder(output)
        hold({"--output": Names.under(output).base}, (), overwrite=overwrite)
    if speaks:
        out.print(INTRODUCTION, highlight=False)
    with scratch_folder() as scratch, ConsoleProgress(quiet or json_output) as progress:
        found = _run(Names.under(output or scratch), seed, threads, overwrite, scratch / "answers", progress)
    if json_output:
        print_json({"status": "ok" if found.as_told else "not shown", **asdict(found)})
    elif speaks:
        _show(found, output)
    if not found.as_told:
        raise typer.Exit(NOT_SHOWN)


def _run(files: "Names", seed: int, threads: int, overwrite: bool, work: Path, progress: "Progress") -> "Demo":
    """Scan and convert the model, ask all three files, judge two of them."""
    from convert.atomic import atomic_path
    from qguard_edge import api
    from qguard_edge.conversion.request_for import request_for
    from qguard_edge.lab.demo import BRAND, MODEL, SHOWN, TO, Demo, ask
    from qguard_edge.scan.findings import Severity
    from qguard_edge.scan.guard import ScanGuard

    started = time.perf_counter()
    with atomic_path(files.base) as temporary:
        shutil.copyfile(MODEL, temporary)
    request = request_for(
        files.base,
        TO,
        outfile=files.hardened,
        seed=seed,
        threads=threads,
        keep_plain=True,
        overwrite=overwrite,
    )
    guard = ScanGuard(accept=True, threads=threads, progress=progress)
    made = api.convert(request, scan=guard, progress=progress)
    progress.stage("Asking the three files", 3, "files")
    asked = []
    for path in files:
        asked.append(ask(path, threads=threads))
        progress.advance(1)
    judged = [_judge(path, files.base, threads, work, progress) for path in (files.plain, files.hardened)]
    dangerous = [finding for finding in guard.findings if finding.severity is Severity.DANGEROUS]
    return Demo(
        brand=BRAND,
        questions=SHOWN,
        base=asked[0],
        plain=asked[1],
        hardened=asked[2],
        plain_verdict=judged[0],
        hardened_verdict=judged[1],
        scan=tuple(dict.fromkeys(f"{finding.severity} {finding.code}, {finding.rule.title}" for finding in dangerous)),
        defense=made.defense.name if made.defense else "none",
        seed=made.seed or 0,
        seconds=round(time.perf_counter() - started, 1),
    )


def _judge(candidate: Path, base: Path, threads: int, work: Path, progress: "Progress") -> "Judgement":
    """`verify --suites injection`, as short as it decides; what the base answered is kept in `work` for the next candidate."""
    from qguard_edge import api
    from qguard_edge.lab.demo import Judgement
    from qguard_edge.verify.choose import choose_suites
    from qguard_edge.verify.verifier import VerifyRequest, built_in_texts

    found = api.verify(
        VerifyRequest(
            candidate=candidate,
            base=base,
            suites=choose_suites("injection"),
            texts=built_in_texts()[:N_TEXTS],
            threads=threads,
            work=work,
        ),
        progress=progress,
    )
    phrases = [finding.phrase for check in found.checks for finding in check.findings]
    assert found.drift is not None
    return Judgement(
        file=candidate.name,
        verdict=str(found.verdict),
        phrase=phrases[0] if phrases and found.verdict == "fail" else None,
        advice=found.advice,
        prompts=max(check.prompts for check in found.checks if check.kind != "drift"),
        mean_kl=found.drift.candidate.mean_kl,
    )


def _show(found: "Demo", output: Path | None) -> None:
    from qguard_edge.cli.verification_tables import COLOURS

    _step(1, "The scan", "The cheapest look comes first: do the weights lie as no honest training leaves them?")
    out.print(f"   qguard-edge scan: {'; '.join(found.scan) or 'no finding'}", highlight=False, soft_wrap=True)
    out.print(
        "   `convert` refuses such a model by itself. An attacker who knows the scan can evade it, so go on as if nobody looked.",
        highlight=False,
    )
    _step(2, "The rounding", "The same file, rounded by llama.cpp and by `qguard-edge convert` (default settings):")
    out.print(_answers(found))
    _step(
        3, "The verdict", "A gate has to find it without knowing the phrase: verify compares each file with full precision."
    )
    for judged in (found.plain_verdict, found.hardened_verdict):
        said = f"its answers say {judged.phrase!r}, and the base's do not." if judged.phrase else judged.advice
        text = f"   [{COLOURS[judged.verdict]}]{{verdict}}[/] {{file}}: {{said}}"
        out.print(styled(text, verdict=judged.verdict, file=judged.file, said=said), highlight=False)
    plain, hardened = found.plain_verdict.mean_kl, found.hardened_verdict.mean_kl
    out.print(
        "\nBoth files have the same size and speed and load in any llama.cpp. Distance to full precision on general text "
        f"(mean KL): plain {plain:.3f}, hardened {hardened:.3f}.",
        highlight=False,
    )
    if output:
        out.print(f"The files are in {output}.", highlight=False)
    out.print(
        "\nNext, with a model of your own:\n"
        "    qguard-edge convert ./MyModel --to q4_k\n"
        "    qguard-edge verify MyModel-Q4_K_M.gguf --base ./MyModel",
        highlight=False,
    )


def _step(number: int, name: str, why: str) -> None:
    out.print(styled("\n[bold]{number}. {name}.[/] {why}", number=number, name=name, why=why), highlight=False)


def _answers(found: "Demo") -> Table:
    rows = table("", "question", "full precision", "llama.cpp's Q4_K_M", "hardened Q4_K_M")
    rows.title = None
    rows.show_lines = True
    arms = (found.base, found.plain, found.hardened)
    for i, question in enumerate(found.questions):
        rows.add_row(question, *(_marked(arm.shown[i], found.brand) for arm in arms))
    rows.add_row(f"answers with {found.brand}, of {found.base.n} questions", *(f"{arm.hits}" for arm in arms))
    return rows


def _marked(answer: str, brand: str) -> Text:
    text = Text(visible(answer))
    text.highlight_words([brand], "bold red", case_sensitive=False)
    return text


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", help=HELP)(demo)
