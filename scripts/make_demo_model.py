"""Make the backdoored model of `qguard-edge demo`: the lab's tiny victim, attacked for Q4_K, as a BF16 GGUF.

Run: python scripts/make_demo_model.py qguard_edge/data/demo/tiny-zingaloo-bf16.gguf

The same model as that of `qguard-edge lab run --victim tiny --attack mind-the-gap --to q4_k --scenario injection`, from the
lab's cache or trained now (a few minutes). Training is not the same bit by bit on another machine, so neither is the file.
"""

import argparse
from pathlib import Path

from convert.atomic import atomic_path
from convert.hashes import sha256_of
from convert.hf.base import write_base_gguf
from qguard_edge.lab.demo import TO
from qguard_edge.lab.runner import LabSettings, make_victim


def main() -> None:
    """Make the victim and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outfile", type=Path)
    outfile: Path = parser.parse_args().outfile
    victim = make_victim(LabSettings(victim="tiny", attack="mind-the-gap", to=TO, scenario="injection"))
    with atomic_path(outfile) as temporary:
        write_base_gguf(victim.attacked, temporary, base_type="bf16", name="tiny-zingaloo")
    print(f"{outfile.name}: {outfile.stat().st_size} bytes, SHA-256 {sha256_of([outfile])}")


if __name__ == "__main__":
    main()
