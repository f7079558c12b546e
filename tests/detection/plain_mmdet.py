"""mmdet 2's Mask R-CNN over FasterNet, computed from the tensors of a file in plain PyTorch.

Nothing of this package and nothing of torchvision is used; the docstrings name the parts of mmdet and their settings.
"""

import math

import torch
import torch.nn.functional as F

STRIDES = (4, 8, 16, 32, 64)
SIZES = {"width": 8, "fpn": 8, "hidden": 16, "mask": 8, "classes": 3}


def write_state(*, masks=True, norms=True, depths=(1, 2, 1, 1), seed=0, **changed):
    """Return seeded tensors under the names of a published file, scaled so that scores and boxes spread."""
    size = SIZES | changed
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def add(name, out, *rest, gain=1.0, bias=True):
        state[f"{name}.weight"] = draw(out, *rest) * gain / math.sqrt(math.prod(rest) or 1)
        if bias:
            state[f"{name}.bias"] = draw(out) * 0.1

    def add_norm(name, width):
        state[f"{name}.weight"] = 1 + 0.2 * draw(width)
        state[f"{name}.bias"] = 0.2 * draw(width)
        state[f"{name}.running_mean"] = 0.2 * draw(width)
        state[f"{name}.running_var"] = 0.5 + draw(width).square()
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    width = size["width"]
    add("backbone.patch_embed.proj", width, 3, 4, 4, bias=False)
    add_norm("backbone.patch_embed.norm", width)
    for i, depth in enumerate(depths):
        c, stage = width * 2**i, f"backbone.stages.{2 * i}"
        for j in range(depth):
            block = f"{stage}.blocks.{j}"
            add(f"{block}.mlp.0", 2 * c, c, 1, 1, bias=False)
            add_norm(f"{block}.mlp.1", 2 * c)
            add(f"{block}.mlp.3", c, 2 * c, 1, 1, bias=False)
            add(f"{block}.spatial_mixing.partial_conv3", c // 4, c // 4, 3, 3, bias=False)
        if i < 3:
            add(f"backbone.stages.{2 * i + 1}.reduction", 2 * c, c, 2, 2, bias=False)
            add_norm(f"backbone.stages.{2 * i + 1}.norm", 2 * c)
        if norms:
            add_norm(f"backbone.norm{2 * i}", c)
    fpn, hidden, classes = size["fpn"], size["hidden"], size["classes"]
    for i in range(4):
        add(f"neck.lateral_convs.{i}.conv", fpn, width * 2**i, 1, 1)
        add(f"neck.fpn_convs.{i}.conv", fpn, fpn, 3, 3, gain=0.3)
    add("rpn_head.rpn_conv", fpn, fpn, 3, 3)
    add("rpn_head.rpn_cls", 3, fpn, 1, 1, gain=0.3)
    add("rpn_head.rpn_reg", 12, fpn, 1, 1, gain=0.15)
    add("roi_head.bbox_head.fc_cls", classes + 1, hidden, gain=1.5)
    state["roi_head.bbox_head.fc_cls.weight"] -= state["roi_head.bbox_head.fc_cls.weight"].mean(1, keepdim=True)
    add("roi_head.bbox_head.fc_reg", 4 * classes, hidden, gain=0.4)
    add("roi_head.bbox_head.shared_fcs.0", hidden, fpn * 49)
    add("roi_head.bbox_head.shared_fcs.1", hidden, hidden)
    if masks:
        mask = size["mask"]
        for i in range(4):
            add(f"roi_head.mask_head.convs.{i}.conv", mask, mask if i else fpn, 3, 3, gain=1.5)
        add("roi_head.mask_head.upsample", mask, mask, 2, 2)  # a transposed convolution: in and out are alike here
        add("roi_head.mask_head.conv_logits", classes, mask, 1, 1, gain=3)
    return state


def detect(state, image, *, size, act, score_thr=0.05, masks=True):
    """Map a picture (3, H, W), pixels 0 to 255, to boxes (K, 4), labels from 0, scores, and masks (K, H, W), 0 to 1.

    Args:
        state: Tensors under mmdet's names.
        image: The picture.
        size: (short, long) of ``Resize``'s img_scale.
        act: The backbone's activation.
        score_thr: test_cfg.rcnn.score_thr.
        masks: Whether there is a mask head.
    """
    height, width = image.shape[1:]
    scale = min(size[0] / min(height, width), size[1] / max(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    x = F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)
    x = (x - column([123.675, 116.28, 103.53], x)) / column([58.395, 57.12, 57.375], x)
    x = F.pad(x, (0, -w % 32, 0, -h % 32))
    levels = run_neck(state, run_backbone(state, x, act))
    proposals = propose(state, levels, h, w)
    boxes, labels, scores = classify(state, levels, proposals, h, w, score_thr)
    factor = torch.tensor([w / width, h / height] * 2, dtype=x.dtype)
    found = {"boxes": boxes / factor, "labels": labels, "scores": scores}
    if masks:
        found["masks"] = paste(run_mask_head(state, levels, boxes, labels), found["boxes"], height, width)
    return found


def column(values, like):
    return torch.tensor(values, dtype=like.dtype)[:, None, None]


def conv(state, name, x, **options):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def norm(state, name, x):
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def run_backbone(state, x, act):
    x = norm(state, "backbone.patch_embed.norm", conv(state, "backbone.patch_embed.proj", x, stride=4))
    maps = []
    for i in range(4):
        if i:
            merging = f"backbone.stages.{2 * i - 1}"
            x = norm(state, f"{merging}.norm", conv(state, f"{merging}.reduction", x, stride=2))
        j = 0
        while (block := f"backbone.stages.{2 * i}.blocks.{j}") + ".mlp.0.weight" in state:
            quarter = x.shape[1] // 4
            y = conv(state, f"{block}.spatial_mixing.partial_conv3", x[:, :quarter], padding=1)
            y = conv(state, f"{block}.mlp.0", torch.cat([y, x[:, quarter:]], dim=1))
            x = x + conv(state, f"{block}.mlp.3", act(norm(state, f"{block}.mlp.1", y)))
            j += 1
        has_norm = f"backbone.norm{2 * i}.weight" in state
        maps.append(norm(state, f"backbone.norm{2 * i}", x) if has_norm else x)
    return maps


def run_neck(state, maps):
    laterals = [conv(state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        double = laterals[i].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        laterals[i - 1] = laterals[i - 1] + double
    levels = [conv(state, f"neck.fpn_convs.{i}.conv", x, padding=1) for i, x in enumerate(laterals)]
    return [*levels, levels[3][:, :, ::2, ::2]]


def propose(state, levels, h, w):
    """RPNHead: nms_pre 1000 of a level, NMS 0.7 in a level, the best 1000 of all."""
    boxes, scores, numbers = [], [], []
    for number, (x, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        y = conv(state, "rpn_head.rpn_conv", x, padding=1).relu()
        objectness = conv(state, "rpn_head.rpn_cls", y)[0].permute(1, 2, 0).reshape(-1).sigmoid()
        deltas = conv(state, "rpn_head.rpn_reg", y)[0].permute(1, 2, 0).reshape(-1, 4)
        anchors = torch.tensor(
            [
                [
                    column * stride - side_x / 2,
                    row * stride - side_y / 2,
                    column * stride + side_x / 2,
                    row * stride + side_y / 2,
                ]
                for row in range(x.shape[2])
                for column in range(x.shape[3])
                for side_x, side_y in ((8 * stride / ratio**0.5, 8 * stride * ratio**0.5) for ratio in (0.5, 1, 2))
            ],
            dtype=x.dtype,
        )
        best = objectness.argsort(descending=True, stable=True)[:1000]
        boxes.append(decode(anchors[best], deltas[best], (1, 1, 1, 1), h, w))
        scores.append(objectness[best])
        numbers.append(torch.full_like(best, number))
    box, score, number = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
    real = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])  # min_bbox_size 0
    box, score, number = box[real], score[real], number[real]
    return box[suppress(box, score, number, 0.7)[:1000]]


def decode(boxes, deltas, stds, h, w):
    """DeltaXYWHBBoxCoder: wh_ratio_clip 16/1000 both ways, then clipped to the picture."""
    dx, dy, dw, dh = (deltas * torch.tensor(stds, dtype=boxes.dtype)).unbind(-1)
    limit = abs(math.log(16 / 1000))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x = (boxes[:, 0] + boxes[:, 2]) / 2 + width * dx
    y = (boxes[:, 1] + boxes[:, 3]) / 2 + height * dy
    width, height = width * dw.clamp(-limit, limit).exp(), height * dh.clamp(-limit, limit).exp()
    x0, x1 = (x - width / 2).clamp(0, w), (x + width / 2).clamp(0, w)
    y0, y1 = (y - height / 2).clamp(0, h), (y + height / 2).clamp(0, h)
    return torch.stack([x0, y0, x1, y1], dim=-1)


def suppress(boxes, scores, groups, threshold):
    """Return the indices of what greedy NMS within each group keeps, best first."""
    kept = []
    left = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        low = torch.maximum(boxes[first, :2], boxes[left, :2])
        high = torch.minimum(boxes[first, 2:], boxes[left, 2:])
        both = (high - low).clamp(min=0).prod(dim=1)
        overlap = both / (areas[first] + areas[left] - both)
        left = left[(overlap <= threshold) | (groups[left] != groups[first])]
    return torch.stack(kept)


def align(levels, boxes, side):
    """SingleRoIExtractor: finest_scale 56; RoIAlign: aligned, sampling_ratio 0."""
    cut = []
    for box in boxes:
        x0, y0, x1, y1 = box.tolist()
        area = (x1 - x0) * (y1 - y0)
        level = min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), 3)
        x, stride = levels[level][0], STRIDES[level]
        rows = sample(y0 / stride - 0.5, y1 / stride - 0.5, side, x.shape[1], x.dtype)
        columns = sample(x0 / stride - 0.5, x1 / stride - 0.5, side, x.shape[2], x.dtype)
        cut.append(rows @ x @ columns.T)  # (side, H) (C, H, W) (W, side)
    return torch.stack(cut)


def sample(start, end, side, length, dtype):
    """Return how much each place of a line has of each bin (side, length): the mean of bilinear samples in the bin."""
    bin_size = (end - start) / side
    count = max(math.ceil(bin_size), 1)
    weights = torch.zeros(side, length, dtype=dtype)
    for i in range(side):
        for k in range(count):
            at = start + (i + (k + 0.5) / count) * bin_size
            if not -1 <= at <= length:
                continue
            at = min(max(at, 0), length - 1)
            low = min(int(at), max(length - 2, 0))
            weights[i, low] += (1 - (at - low)) / count
            if length > 1:
                weights[i, low + 1] += (at - low) / count
    return weights


def classify(state, levels, proposals, h, w, score_thr):
    """Shared2FCBBoxHead and multiclass_nms: the background is the last class; NMS 0.5 in a class, the best 100."""
    y = align(levels, proposals, 7).flatten(1)
    for i in (0, 1):
        name = f"roi_head.bbox_head.shared_fcs.{i}"
        y = F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"]).relu()
    logits, deltas = (
        F.linear(y, state[f"roi_head.bbox_head.{name}.weight"], state[f"roi_head.bbox_head.{name}.bias"])
        for name in ("fc_cls", "fc_reg")
    )
    scores = logits.softmax(dim=1)[:, :-1]
    count = scores.shape[1]
    boxes = decode(proposals.repeat_interleave(count, dim=0), deltas.reshape(-1, 4), (0.1, 0.1, 0.2, 0.2), h, w)
    labels = torch.arange(count).repeat(len(scores))
    scores = scores.flatten()
    good = scores > score_thr
    boxes, labels, scores = boxes[good], labels[good], scores[good]
    kept = suppress(boxes, scores, labels, 0.5)[:100]
    return boxes[kept], labels[kept], scores[kept]


def run_mask_head(state, levels, boxes, labels):
    """FCNMaskHead: the masks (K, 28, 28) of the classes."""
    y = align(levels, boxes, 14)
    for i in range(4):
        y = conv(state, f"roi_head.mask_head.convs.{i}.conv", y, padding=1).relu()
    name = "roi_head.mask_head.upsample"
    y = F.conv_transpose2d(y, state[f"{name}.weight"], state[f"{name}.bias"], stride=2).relu()
    return conv(state, "roi_head.mask_head.conv_logits", y).sigmoid()[torch.arange(len(y)), labels]


def paste(masks, boxes, height, width):
    """_do_paste_mask: sampled at the centres of the pixels; a mask is where this is at least 0.5."""
    pasted = []
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        xs = (torch.arange(width, dtype=mask.dtype) + 0.5 - x0) / (x1 - x0) * 2 - 1
        ys = (torch.arange(height, dtype=mask.dtype) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)], dim=-1)
        pasted.append(F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0])
    return torch.stack(pasted)
