"""Attribution against all orders of replacement, truth tables made by hand, and planted faults."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from medfusion.analysis.definition import Definition
from medfusion.analysis.parts import (
    Parts,
    attribute,
    harmful,
    parts_from_table,
    sequential_blame,
    shapley,
    subset_name,
    working_order,
)
from medfusion.errors import MedfusionError

RULE = {"kind": "value", "column": "dice", "below": 0.7}
DEFINITION = Definition.model_validate({"name": "dice", "case": "one scan", "error": RULE})


def parts(error, patients=None, names="abcdef") -> Parts:
    error = np.asarray(error, bool)
    cases = np.array([f"case{number}" for number in range(len(error))])
    components = tuple(names[: int(np.log2(error.shape[1]))])
    return Parts(components, cases, cases if patients is None else patients, error, error.astype(float))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shapley_is_the_mean_over_all_orders(count: int) -> None:
    values = np.random.default_rng(count).normal(size=(4, 2**count))
    expected = np.zeros((4, count))
    orders = list(permutations(range(count)))
    for order in orders:
        subset = 0
        for k in order:
            expected[:, k] += (values[:, subset] - values[:, subset | 1 << k]) / len(orders)
            subset |= 1 << k
    np.testing.assert_allclose(shapley(values), expected, atol=1e-12)
    np.testing.assert_allclose(shapley(values).sum(axis=1), values[:, 0] - values[:, -1])


# columns: none, a, b, a and b
CASES = {
    "right": [0, 0, 0, 0],
    "a alone mends it": [1, 0, 1, 0],
    "b alone mends it": [1, 1, 0, 0],
    "either mends it": [1, 0, 0, 0],
    "both are needed": [1, 1, 1, 0],
    "nothing mends it": [1, 1, 1, 1],
    "a breaks it": [0, 1, 0, 0],
}


def test_blame_and_harm_by_hand() -> None:
    table = np.array(list(CASES.values()), bool)
    assert sequential_blame(table).tolist() == [-1, 0, 1, 0, 1, 2, -1]
    assert harmful(table).tolist() == [[False, False]] * 6 + [[True, False]]
    found = attribute(parts(table))
    assert found.table["blamed"].tolist() == [2, 2]
    assert found.table["blamed_share"].tolist() == [0.4, 0.4]
    assert found.table["alone"].tolist() == pytest.approx([(2 - 1) / 7, 2 / 7])
    assert found.table["last"].tolist() == pytest.approx([2 / 7, (1 + 1 + 1) / 7])
    assert found.table["harmful"].tolist() == [1, 0]
    assert found.residual == ("case5",)
    assert found.unmended[0] == 0.2
    assert found.harmed == (("a", "case6"),)
    assert (found.none, found.all) == (5 / 7, 1 / 7)
    assert found.table["shapley"].sum() == pytest.approx(4 / 7)
    assert found.order == (("b", pytest.approx(3 / 7)), ("a", pytest.approx(1 / 7)))


def test_a_fault_that_is_only_mended_together_is_shared() -> None:
    found = attribute(parts([[1, 1, 1, 0]] * 10)).table
    assert found["shapley"].tolist() == [0.5, 0.5]
    assert found["blamed"].tolist() == [0, 10]


def test_the_way_takes_the_largest_step_first() -> None:
    values = np.array([1, 0.9, 0.8, 0.1, 0.7, 0.6, 0.5, 0.0])  # c first, though a and b together are better
    assert working_order(values) == [0, 4, 6, 7]


def test_loss_in_place_of_error() -> None:
    one = parts([[1, 0], [1, 0]])
    one = Parts(one.components, one.cases, one.patients, one.error, np.array([[0.5, 0.2], [0.9, 0.0]]))
    found = attribute(one, "loss")
    assert (found.none, found.all) == (0.7, 0.1)
    assert found.table["shapley"].tolist() == pytest.approx([0.6])


def test_without_an_error_nobody_is_to_blame() -> None:
    found = attribute(parts(np.zeros((12, 4)))).table
    assert (found[["shapley", "alone", "last", "blamed", "blamed_share", "harmful"]] == 0).all(axis=None)


def test_intervals_cover_planted_shares() -> None:
    """Faults in a (20 %), in b (10 %), in both (5 %), and labels that nothing mends (5 %); 3 scans of each patient."""
    kinds = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    planted = np.array([0.6, 0.2, 0.1, 0.05, 0.05])
    truth, rng, inside = shapley((kinds.T * planted).sum(axis=1)), np.random.default_rng(0), []
    patients = np.repeat(np.arange(60).astype(str), 3)
    for _ in range(200):
        kind = rng.choice(5, 60, p=planted)
        each = np.where(rng.random((60, 3)) < 0.5, kind[:, None], rng.choice(5, (60, 3), p=planted)).ravel()
        found = attribute(parts(kinds[each], patients)).table
        inside.append((found["low"] <= truth + 1e-12) & (truth - 1e-12 <= found["high"]))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.05)


def rows(*subsets: str) -> pd.DataFrame:
    values = {"": "0.2", "a": "0.9", "b": "0.5", "a+b": "0.95", "b+a": "0.95"}
    cells = [(case, "p", fixed, values[fixed]) for case in ("x", "y") for fixed in subsets]
    return pd.DataFrame(cells, columns=["case", "patient", "fixed", "dice"])


def test_a_table_of_subsets() -> None:
    found = parts_from_table(rows("", "a", "b", "b+a"), DEFINITION)
    assert found.components == ("a", "b")
    assert found.cases.tolist() == ["x", "y"]
    assert found.patients.tolist() == ["p", "p"]
    assert found.error.tolist() == [[True, False, True, False]] * 2
    np.testing.assert_allclose(found.loss, [[0.8, 0.1, 0.5, 0.05]] * 2)
    turned = parts_from_table(rows("", "a", "b", "b+a"), DEFINITION, ("b", "a"))
    assert turned.error.tolist() == [[True, True, False, False]] * 2
    assert [subset_name(k, turned.components) for k in range(4)] == ["", "b", "a", "b+a"]


@pytest.mark.parametrize(
    ("table", "problem", "facts"),
    [
        (rows("", "a", "b"), "every case needs all 4", {"incomplete": "x, y", "no_case_has": "a+b"}),
        (rows("", "a", "b", "a+b").iloc[:-1], "every case needs all 4", {"incomplete": "y"}),
        (rows("", "a", "b", "a+b", "b+a"), "a subset twice", {"cases": "x, y"}),
        (rows("", "a", "a+b"), "not a subset", {"components": "a"}),
        (rows(""), "0 components", {}),
        (rows("", "a").assign(patient=list("pqrr")), "without a patient, or with two", {"cases": "x"}),
        (rows("", "a").drop(columns="fixed"), "lacks columns", {"missing": "fixed"}),
    ],
)
def test_tables_that_cannot_be_attributed(table: pd.DataFrame, problem: str, facts: dict[str, str]) -> None:
    with pytest.raises(MedfusionError, match=problem) as error:
        parts_from_table(table, DEFINITION)
    assert {name: error.value.facts[name] for name in facts} == facts
