"""Compare measured weights with the paper's figures, in words, as a page in Markdown and as CSV."""

from collections.abc import Iterator

from Evaluation.tables import csv_text, escaped, table, with_interval
from util.files import some

PAGE, RESULT, ROWS = "verdict.md", "verdict.json", "verdict.csv"
MARK = "<!-- ARM verdict -->\n"  # at the head of the page
# Top-1 on ImageNet-1k in percent by channels, blocks, and side of the input in finetuning. Source: the abstract of
# arXiv 2406.07537; it gives none for the large model.
PAPER = {(768, 12, 224): 83.2, (1536, 24, 224): 85.0, (1536, 24, 384): 85.5}
ROUNDING = 0.05  # points: the paper gives one digit
IMAGES = 50_000  # of ImageNet's validation
COLUMNS = ("file", "sha256", "kind", "measure", "weights", "input", "resize", "top1", "low", "high", "top5", "images",
    "paper", "difference", "verdict")  # fmt: skip
NO_FIGURE = "no published figure"


def paper_figure(file: dict, row: dict) -> float | None:
    """Return the paper's top-1 for a measurement: of ImageNet's classes, at the file's own size; None without one."""
    size = row["size"]
    if row["measure"] != "accuracy" or not row["result"]["imagenet"] or size != file["input_size"] or len({*size}) > 1:
        return None
    return PAPER.get((file["embed_dim"], file["depth"], size[0]))


def judge(row: dict, paper: float | None) -> str:
    """Return in words how an accuracy with its interval compares with a published one."""
    if paper is None:
        return NO_FIGURE
    (low, high), difference = row["interval"], row["acc1"] - paper
    if low <= paper + ROUNDING and paper - ROUNDING <= high:
        return f"agrees: {paper:.1f} % is within the interval ({difference:+.2f} points)"
    return f"{abs(difference):.2f} points {'below' if difference < 0 else 'above'} {paper:.1f} %"


def how(row: dict) -> str:
    """Return the weights and the preprocessing of a measurement in words."""
    return f"{row['weights'] or 'the weights'}, {' x '.join(map(str, row['size']))} pixels, {row['resize']}"


def best(rows: list[dict]) -> dict:
    """Return the row with the highest top-1; of equal ones the first."""
    return max(rows, key=lambda row: row["result"]["acc1"])


def best_at_own_size(file: dict, rows: list[dict]) -> dict | None:
    """Return the best of the measured accuracies at the file's own input size, or None."""
    own = [row for row in accuracies(rows) if row["size"] == file["input_size"]]
    return best(own) if own else None


def accuracies(rows: list[dict]) -> list[dict]:
    """Return the rows of accuracies that were measured."""
    return [row for row in rows if row["measure"] == "accuracy" and "result" in row]


def sentence(file: dict, rows: list[dict]) -> str:
    """Return the verdict on a file in one sentence.

    Args:
        file: what it is.
        rows: its measurements, all that are planned.
    """
    name = f"**{escaped(file['file'])}**"
    if file["problem"]:
        return f"{name} {file['kind']}: {escaped(file['problem'])}"
    if file["kind"] != "classification":
        done = [
            f"{row['measure']} {with_interval(best_probe(row))}"
            for row in rows
            if row["measure"].startswith("probe") and "result" in row
        ]
        return f"{name} comes from {file['kind']}: {'; '.join(done) or 'nothing was measured of it'}."
    measured = accuracies(rows)
    if not measured:
        return f"{name} is a classifier whose accuracy is not measured."
    own = [row for row in measured if row["size"] == file["input_size"]]
    paper = paper_figure(file, own[0]) if own else None
    if paper is None:
        top = best(measured)
        return f"{name} has {NO_FIGURE} to compare with: at best {with_interval(top['result'])}, with {how(top)}."
    agreeing = [row for row in own if judge(row["result"], paper).startswith("agrees")]
    if agreeing:
        top = best(agreeing)
        others = "; ".join(how(row) for row in agreeing if row is not top)
        more = f" So do: {others}." if others else " No other weights or resize at this size do."
        return f"{name} gives the paper's {paper:.1f} %: {with_interval(top['result'])} with {how(top)}.{more}"
    near = min(own, key=lambda row: abs(row["result"]["acc1"] - paper))
    words = judge(near["result"], paper)
    return f"{name} does not give the paper's {paper:.1f} %: the nearest is {words}, with {how(near)}."


def best_probe(row: dict) -> dict:
    """Return the best of the results of a probe, such as that of the best number of neighbours."""
    return max(row["result"]["results"], key=lambda found: found["acc1"])


def results_of(row: dict) -> list[tuple[str, dict]]:
    """Return the titles and numbers of a measurement; of a probe there may be several."""
    if row["measure"].startswith("probe"):
        return [(f"probe {found['probe']}", found) for found in row["result"]["results"]]
    return [(row["measure"], row["result"])]


def lines_of(content: dict) -> Iterator[dict]:
    """Yield a dict with `COLUMNS`, and the numbers as "result", for each number that was measured."""
    files = {file["file"]: file for file in content["files"]}
    for row in content["measurements"]:
        if "result" not in row:
            continue
        file = files[row["file"]]
        paper = paper_figure(file, row)
        for title, result in results_of(row):
            low, high = result.get("interval", (None, None))
            yield {
                "file": file["file"], "sha256": file["sha256"], "kind": file["kind"], "measure": title,
                "weights": row["weights"] or "", "input": "x".join(map(str, row["size"])), "resize": row["resize"],
                "top1": result["acc1"], "low": low, "high": high, "top5": result["acc5"], "images": result["images"],
                "paper": paper, "difference": None if paper is None else result["acc1"] - paper,
                "verdict": judge(result, paper) if row["measure"] == "accuracy" else "", "result": result,
            }  # fmt: skip


def csv_of(content: dict) -> str:
    """Return all numbers as CSV."""
    return csv_text([COLUMNS, *([line[name] for name in COLUMNS] for line in lines_of(content))])


def cells(line: dict, with_paper: bool) -> list:
    """Return a number as the cells of a table."""
    result = line["result"]
    top1 = with_interval(result) if "interval" in result else f"{result['acc1']:.2f} %"
    if "mce" in result:
        top1 += f", mCE {result['mce']:.1f} %"
    named = [line["weights"] or "-", line["input"], line["resize"], top1, f"{result['acc5']:.2f} %", line["images"]]
    if not with_paper:
        return [escaped(line["file"]), line["measure"], *named]
    figures = ["-", "-"] if line["paper"] is None else [f"{line['paper']:.1f} %", f"{line['difference']:+.2f}"]
    return [escaped(line["file"]), *named, *figures, line["verdict"]]


def page(content: dict) -> str:
    """Return the page: the verdict in sentences, tables, what was not measured, and the facts."""
    files, rows, data = content["files"], content["measurements"], content["data"]
    lines = [f"# Verdict on {escaped(content['weights'])}"]
    if content["waiting"]:
        lines.append("**This run is not finished**: the same command continues it.")
    own = {file["file"]: [row for row in rows if row["file"] == file["file"]] for file in files}
    lines.append("\n".join(f"- {sentence(file, own[file['file']])}" for file in files))
    if data["classes"] == 1000 and data["images"] != IMAGES:
        lines.append(
            f"The images are {data['images']}, not the {IMAGES} of ImageNet's validation set, on which the paper's "
            "figures stand."
        )
    numbers = [*lines_of(content)]
    named = ["weights", "input", "resize", "top-1 (95 % over images)", "top-5", "images"]
    if found := [cells(line, True) for line in numbers if line["measure"] == "accuracy"]:
        lines += ["## Accuracy", table(["file", *named, "paper", "difference", "verdict"], *found)]
        lines.append(
            "Intervals are 95 % Wilson intervals over the images. The paper's figures are of finetuning at the input "
            "size of the file: rows at other sizes have none. square: resized to a square, as the released code does; "
            "shorter: the shorter side is resized, and the centre taken."
        )
    if found := [cells(line, False) for line in numbers if line["measure"] != "accuracy"]:
        lines += ["## Robustness and probes", table(["file", "measured", *named], *found)]
        lines.append(
            "Robustness is measured at the file's own size with the weights and the resize that are best on the images "
            "above. Probes have the defaults of probe.py. The paper has figures for robustness; they could not be "
            "checked and are not in this table. Probes have no published figure."
        )
    lines += ["## Not measured", "\n".join(f"- {line}" for line in not_measured(content)) or "Nothing was left out."]
    head = ["file", "what it is", "bytes", "SHA-256"]
    about = [
        [escaped(f["file"]), escaped(f["what"] or f["kind"]), f["bytes"], f["sha256"] or "-"] for f in content["files"]
    ]
    lines += ["## Files", table(head, *about)]
    if content["others"]:
        lines.append(f"Not weights, {len(content['others'])}: {escaped(some(content['others'], 10))}.")
    facts = {
        "weights": content["weights"], "commit of the hub's repository": content["revision"] or "-",
        "images": f"{data['images']} of {data['classes']} classes in {data['root']}",
        "fingerprint of the images": data["fingerprint"], **settings_of(rows), **content["run"],
    }  # fmt: skip
    lines += ["## Run", table(["what", "value"], *([name, escaped(str(value))] for name, value in facts.items()))]
    return MARK + "\n\n".join(lines) + "\n"


def settings_of(rows: list[dict]) -> dict[str, str]:
    """Return the machines and dates of the measurements: several if runs were continued elsewhere."""
    made: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row.get("machine", {}).items():
            if str(value) not in made.setdefault(name, []):
                made[name].append(str(value))
    return {name: ", ".join(values) for name, values in made.items()}


def not_measured(content: dict) -> list[str]:
    """Return a line for everything that was left out, could not be measured, or is not there yet."""
    lines = [f"{escaped(file['file'])}: {escaped(line)}" for file in content["files"] for line in file["left_out"]]
    for row in content["measurements"]:
        if "result" not in row:
            why = f"it failed: {row['failed']}" if "failed" in row else "not yet"
            lines.append(f"{escaped(row['file'])}: {row['measure']} with {how(row)}: {escaped(why)}")
    waiting = f"not yet or not completely: {', '.join(content['waiting'])}"
    return [escaped(line) for line in [waiting] * bool(content["waiting"]) + content["left_out"]] + lines
