"""The paper's tables and figures as data: what each shows, what reproduces it, and what it needs."""

from __future__ import annotations

from typing import Any, NamedTuple

GPU, ARM = "a GPU", "an ARM machine"


class Item(NamedTuple):
    """A table or figure of the paper, or a part of one that needs something else.

    Attributes:
        paper: "Table 1" to "Figure 8".
        what: What is reproduced.
        command: The command line.
        needs: ``GPU``, ``ARM``, "pictures", "weights", "ImageNet", "COCO"; nothing where any machine will do.
    """

    paper: str
    what: str
    command: str
    needs: tuple[str, ...] = ()


def _list_devices(paper: str, what: str, name: str, needs: tuple[str, ...] = ()) -> tuple[Item, ...]:
    """Return the three columns of what the paper measured: CPU, GPU and ARM."""
    command = f"fasternet reproduce {name}"
    return (
        Item(paper, f"{what}, CPU", command, needs),
        Item(paper, f"{what}, GPU", f"{command} --device cuda", (*needs, GPU)),
        Item(paper, f"{what}, ARM", command, (*needs, ARM)),
    )


ITEMS = (
    *_list_devices("Table 1", "operators: FLOPS", "table1"),
    Item("Table 2", "approximation of a convolution: losses", "fasternet reproduce table2 --data DIR", ("pictures",)),
    *_list_devices("Table 3", "networks: latency and throughput", "table3"),
    Item("Table 3", "networks: top-1", "fasternet eval fasternet_t0 --data IMAGENET", ("ImageNet", "weights")),
    Item("Table 4", "detection: parameters, multiply-adds and latency, CPU", "fasternet reproduce table4"),
    Item("Table 4", "detection: latency, GPU", "fasternet reproduce table4 --device cuda", (GPU,)),
    Item("Table 4", "detection: AP", "fasternet detect eval --data COCO --checkpoint DETECTOR", ("COCO", "weights")),
    *_list_devices("Table 5", "ablation: latency and throughput", "table5"),
    Item("Table 5", "ablation: top-1 of small networks", "fasternet reproduce table5 --data DIR", ("pictures",)),
    Item("Table 5", "ablation: top-1", "fasternet study ablation --size full --data IMAGENET", ("ImageNet", GPU)),
    Item("Table 6", "recipes, cell by cell", "fasternet reproduce table6"),
    Item("Table 6", "training", "bash runs/imagenet_8gpus.sh IMAGENET", ("ImageNet", GPU)),
    Item("Table 7", "recipes of detection, cell by cell", "fasternet reproduce table7"),
    Item("Table 7", "training", "bash runs/coco_1x.sh COCO", ("COCO", GPU)),
    Item("Table 8", "variants: parameters and multiply-adds", "fasternet reproduce table8"),
    *_list_devices("Table 9", "split_cat and slicing", "table9"),
    *_list_devices("Figure 1", "FLOPS of operators over their FLOPs", "fig1"),
    Item("Figure 2", "FLOPS and latency of networks over their FLOPs, CPU", "fasternet reproduce fig2"),
    Item("Figure 3", "redundant feature maps of ResNet50", "fasternet reproduce fig3 IMG", ("pictures", "weights")),
    Item("Figure 4", "the architecture", "fasternet reproduce fig4"),
    Item("Figure 5", "PConv + PWConv, T-shaped and regular convolution", "fasternet reproduce fig5"),
    Item("Figure 6", "salient positions in the filters of ResNet18", "fasternet reproduce fig6", ("weights",)),
    *_list_devices("Figure 7", "published top-1 over measured speed", "fig7"),
    *_list_devices("Figure 8", "the same, all networks", "fig8"),
)


def explain_item(item: Item, *, has_cuda: bool, architecture: str) -> str:
    """Say whether an item can be reproduced on a machine: "yes", "yes, with ImageNet", "no: ..."."""
    if GPU in item.needs and not has_cuda:
        return "no: no CUDA device is visible to torch"
    if ARM in item.needs and architecture.lower() not in ("aarch64", "arm64"):
        return f"no: this machine is {architecture}"
    data = [need for need in item.needs if need not in (GPU, ARM)]
    return f"yes, with {' and '.join(data)}" if data else "yes"


def describe_items(*, has_cuda: bool, architecture: str) -> list[dict[str, Any]]:
    """Return every item with what it needs, and whether it runs on such a machine."""
    return [
        {
            "paper": item.paper,
            "what": item.what,
            "command": item.command,
            "needs": list(item.needs) or ["nothing"],
            "runs_here": explain_item(item, has_cuda=has_cuda, architecture=architecture),
        }
        for item in ITEMS
    ]
