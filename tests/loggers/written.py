"""What packages for logging wrote to the disk, read back as metrics, tables, pictures and files.

Each reader takes what it needs to find its run, and gives a :class:`Written`.
"""

import csv
import io
import json
import re
import struct
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Written:
    """What one logger holds.

    Attributes:
        metrics: pairs of step and value by name, in their order.
        tables: columns and rows by name.
        pictures: the bytes of the files of pictures by name.
        files: the bytes of other files by name.
    """

    metrics: dict = field(default_factory=lambda: defaultdict(list))
    tables: dict = field(default_factory=dict)
    pictures: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0}).Reload()
    found = Written()
    for name in events.Tags()["scalars"]:
        found.metrics[name] = [(event.step, event.value) for event in events.Scalars(name)]
    for name in events.Tags()["tensors"]:
        [event] = events.Tensors(name)
        text = event.tensor_proto.string_val[0].decode()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        found.tables[name.removesuffix("/text_summary")] = cells[0], cells[2:]
    for name in events.Tags()["images"]:
        [event] = events.Images(name)
        found.pictures[name] = event.encoded_image_string
    return found


def read_csv(folder):
    found = Written()
    with Path(folder, "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.metrics[name].append((step, float(value)))
    return found


def read_mlflow(uri, run):
    from mlflow.artifacts import download_artifacts
    from mlflow.tracking import MlflowClient

    client, found = MlflowClient(uri), Written()
    for name in client.get_run(run).data.metrics:
        history = client.get_metric_history(run, name)
        found.metrics[name] = [(metric.step, metric.value) for metric in history]
    folder = Path(download_artifacts(run_id=run, tracking_uri=uri))
    for path in folder.rglob("*.*"):
        name = f"{path.parent.parent.relative_to(folder)}/{path.stem}"
        if path.suffix == ".json":
            table = json.loads(path.read_text("utf-8"))
            found.tables[name] = table["columns"], table["data"]
        elif path.suffix == ".png":
            found.pictures[name] = path.read_bytes()
        else:
            found.files[f"{path.parent.parent.relative_to(folder)}/{path.name}"] = path.read_bytes()
    return found


def read_wandb(folder):
    """Read the log of a run that was offline: blocks of 32 KiB, each record in one or more parts."""
    from wandb.proto import wandb_internal_pb2

    [path] = Path(folder).glob("*.wandb")
    found = Written()
    for record in _split_records(path.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record)
        if message.WhichOneof("record_type") != "history":
            continue
        items = {"|".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.history.item}
        step = items.pop("trainer/global_step")
        for name, value in items.items():
            key, _, part = name.partition("|")
            kind = items.get(f"{key}|_type")
            if kind == "table-file" and part == "path":
                table = json.loads(Path(folder, "files", value).read_text("utf-8"))
                found.tables[key] = table["columns"], table["data"]
            elif kind == "images/separated" and part == "filenames":
                found.pictures[key] = Path(folder, "files", value[0]).read_bytes()
            elif not part:
                found.metrics[key].append((step, value))
    return found


def _split_records(data, block=32768, head=7):
    at, parts = head, b""
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + head : at + head + length]
        at += head + length
        if kind in {1, 4}:  # the whole of a record, or its last part
            yield parts
            parts = b""


def read_comet(folder):
    [path] = Path(folder).glob("*.zip")
    found = Written()
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)
            payload = message["payload"]
            if message["type"] == "metric_msg":
                metric = payload["metric"]
                found.metrics[metric["metricName"]].append((metric["step"], metric["metricValue"]))
            elif message["type"] == "file_upload":
                content = archive.read(payload["file_path"])
                name = payload["additional_params"].get("fileName")
                if payload["upload_type"] == "visualization":
                    found.pictures[payload["additional_params"]["figName"]] = content
                elif re.search(r"_\d+\.csv$", name):
                    rows = list(csv.reader(io.StringIO(content.decode())))
                    found.tables[name.rpartition("_")[0]] = rows[0], rows[1:]
                elif payload["upload_type"] == "asset":
                    found.files[name] = content
    return found
