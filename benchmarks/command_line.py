"""Arguments that several benchmarks share."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from util import arguments, cli, hardware


def make_parser(
    file: str, docstring: str, numbers: Mapping[str, tuple[int | None, str]], device: bool = True
) -> cli.Parser:
    """Return a parser with `--output`, with `--device` if wanted, and with a flag for each number (default, help)."""
    parser = cli.Parser(file, description=docstring.splitlines()[0])
    if device:
        parser.add_argument(
            "--device", type=arguments.nonempty, help="cuda or cpu (default: cuda where there is a GPU)"
        )
    for name, (default, text) in numbers.items():
        kind = arguments.batch if name == "batch_size" else arguments.positive
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results/)")
    return parser


def fitting(names: Iterable[str]) -> list[str]:
    """Return the names with "toy" on a machine without a GPU, the others on one with a GPU."""
    toys = hardware.default_device().type == "cpu"
    return [name for name in names if ("toy" in name) == toys]
