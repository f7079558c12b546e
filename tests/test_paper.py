"""The paper's tables as data: complete, sourced, and consistent with one another."""

from importlib import resources

import pytest

from fasternet import paper
from fasternet.paper import TABLES, load_accuracy, load_table

NUM_ROWS = {
    "claims": 19,
    "table1_operators": 16,
    "table2_approximation": 5,
    "table3_imagenet": 35,
    "table3_imagenet_remeasured": 6,
    "table4_coco": 12,
    "table5_ablation": 10,
    "table6_imagenet_recipe": 38,
    "table7_coco_recipe": 14,
    "table8_architecture": 6,
    "table9_forward_choice": 10,
    "today_accuracy": 14,
}


def by_name(table: str, column: str) -> dict[str, dict[str, str]]:
    return {row[column]: row for row in load_table(table)}


def test_tables_list_every_file_and_nothing_else():
    files = {file.name for file in resources.files(paper).iterdir() if file.name.endswith(".csv")}
    assert files == {f"{name}.csv" for name in TABLES}
    assert set(TABLES) == set(NUM_ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_load_table_has_all_rows_and_no_ragged_one(name):
    rows = load_table(name)
    assert len(rows) == NUM_ROWS[name]
    for row in rows:
        assert None not in row  # more cells than columns
        assert None not in row.values()  # fewer
        assert all(cell == cell.strip() for cell in row.values())


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"claims"}))
def test_load_table_says_where_each_row_stands(name):
    assert all(row.get("version") or row["source"] for row in load_table(name))


def test_every_network_has_a_published_accuracy_with_its_source():
    accuracies = load_accuracy()
    assert len(accuracies) == 35 + 14
    assert accuracies["FasterNet-T0"] == (71.9, "paper, Table 3")
    assert all(60 < top1 < 90 and source for top1, source in accuracies.values())


def test_load_table_names_what_is_allowed():
    with pytest.raises(ValueError, match="table 'table10' is not one of claims, table1_operators"):
        load_table("table10")


def test_table_1_has_four_operators_at_four_sizes():
    rows = load_table("table1_operators")
    sizes = [(row["channels"], row["height"], row["width"]) for row in rows]
    assert sizes == 4 * [("96", "56", "56"), ("192", "28", "28"), ("384", "14", "14"), ("768", "7", "7")]
    assert len({row["operator"] for row in rows}) == 4


def test_table_2_averages_its_stages():
    *stages, average = load_table("table2_approximation")
    for column in ("dwconv_pwconv_mse", "gconv16_pwconv_mse", "pconv_pwconv_mse"):
        mean = sum(float(row[column]) for row in stages) / 4
        # the last digit of the average was printed from unrounded stages
        assert float(average[column]) == pytest.approx(mean, abs=1.01e-4)


@pytest.mark.parametrize("variant", ["T0", "T1", "T2", "S", "M", "L"])
def test_fasternet_rows_agree_in_tables_3_8_and_9(variant):
    name = f"FasterNet-{variant}"
    imagenet = by_name("table3_imagenet", "network")[name]
    architecture = by_name("table8_architecture", "variant")[variant]
    choice = by_name("table9_forward_choice", "network")[name]
    assert imagenet["macs_g"] == architecture["macs_g_224"] == choice["macs_g"]
    assert imagenet["params_m"] == architecture["params_m"]
    assert imagenet["gpu_throughput_images_per_second"] == choice["gpu_slicing_images_per_second"]
    assert imagenet["cpu_latency_ms"] == choice["cpu_slicing_ms"]
    assert imagenet["arm_latency_ms"] == choice["arm_slicing_ms"]


def test_pconv_rows_agree_in_tables_1_and_9():
    operators = [row for row in load_table("table1_operators") if row["operator"].startswith("pconv")]
    choices = [row for row in load_table("table9_forward_choice") if row["network"] == "PConv x10"]
    for operator, choice in zip(operators, choices, strict=True):
        assert operator["channels"] == choice["channels"]
        assert operator["gpu_throughput_images_per_second"] == choice["gpu_slicing_images_per_second"]
        assert float(operator["cpu_latency_ms"]) == pytest.approx(float(choice["cpu_slicing_ms"]), abs=0.051)


def test_claims_follow_from_table_3():
    claims = {(row["claim"], row["device"]): float(row["v1"]) for row in load_table("claims") if row["v1"]}
    networks = by_name("table3_imagenet", "network")

    def value(network: str, column: str) -> float:
        return float(networks[network][column])

    throughput, cpu, arm = "gpu_throughput_images_per_second", "cpu_latency_ms", "arm_latency_ms"
    t0, xxs = "FasterNet-T0", "MobileViT-XXS"
    speed = f"{t0} against {xxs}: speed"
    assert claims[speed, "gpu"] == round(value(t0, throughput) / value(xxs, throughput), 1)
    assert claims[speed, "cpu"] == round(value(xxs, cpu) / value(t0, cpu), 1)
    assert claims[speed, "arm"] == round(value(xxs, arm) / value(t0, arm), 1)
    gain = value(t0, "top1") - value(xxs, "top1")
    assert claims[f"{t0} against {xxs}: top-1 points", "any"] == pytest.approx(gain)
    for rival in ("Swin-B", "ConvNeXt-B"):
        name = f"FasterNet-L against {rival}"
        ratio = value("FasterNet-L", throughput) / value(rival, throughput)
        saved = 1 - value("FasterNet-L", cpu) / value(rival, cpu)
        assert claims[f"{name}: throughput", "gpu"] == round(ratio, 2)
        assert claims[f"{name}: compute time saved", "cpu"] == round(saved, 2)


@pytest.mark.parametrize("device", ["gpu", "cpu", "arm"])
def test_claims_about_pconv_speed_follow_from_table_1(device):
    def mean_speed(operator: str) -> float:
        rows = [row for row in load_table("table1_operators") if row["operator"] == operator]
        return sum(float(row[f"{device}_gmacs_per_second"]) for row in rows) / len(rows)

    (claim,) = (
        row
        for row in load_table("claims")
        if row["claim"].startswith("PConv against DWConv") and row["device"] == device
    )
    assert float(claim["v1"]) == pytest.approx(mean_speed("pconv3x3_r1/4") / mean_speed("dwconv3x3"), rel=0.03)
