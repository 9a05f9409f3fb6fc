"""Run a system with every subset of its components replaced by oracles.

A system is a Python file of its team's. It says what the cases are, what each component does and would do if it were
perfect, and what is scored:

    from medfusion.analysis.system import component

    def cases():                                    # objects with a name and a patient
        return [...]

    @component(oracle=lambda case: case.true_mask)  # what it should have found
    def organ(case):
        return segment(case.image)

    @component(oracle=lambda case: case.truth)
    def mass(case, organ):                          # gets what the component of this name made
        return classify(case.image, organ)

    def score(case, mass):                          # the columns that the definition of an error reads
        return {"truth": case.truth, "p": mass}
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medfusion.analysis.parts import MOST, subset_name
from medfusion.errors import MedfusionError, some

Function = TypeVar("Function", bound=Callable[..., Any])


def component(*, oracle: Callable[..., Any]) -> Callable[[Function], Function]:
    """Mark a function as a component; ``oracle`` returns its perfect output.

    The parameters of both are ``case`` and names of components above: the best threshold depends on the scores.
    """

    if not callable(oracle):
        raise TypeError(f"an oracle is a function, not {oracle!r}")

    def mark(function: Function) -> Function:
        function.oracle = oracle  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True)
class System:
    """``needs`` and ``oracle_needs`` name what each component, "score", and each oracle take beside the case."""

    components: Mapping[str, Callable[..., Any]]
    needs: Mapping[str, tuple[str, ...]]
    oracle_needs: Mapping[str, tuple[str, ...]]
    cases: Callable[[], Iterable[Any]]
    score: Callable[..., Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the components, in the order in which they work."""
        return tuple(self.components)


def load_system(path: Path) -> System:
    """A system from its file, which is executed as Python executes a script: it may import what lies beside it.

    Raises
    ------
    MedfusionError : it cannot be executed, lacks ``cases``, ``score`` or components, or one takes what is not made
        before it.
    """
    spec = importlib.util.spec_from_file_location(f"medfusion_system_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise MedfusionError(f"{path}: no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise MedfusionError(f"{path}: cannot be executed", reason=f"{type(error).__name__}: {error}") from error
    functions = {name: value for name, value in vars(module).items() if callable(value)}
    components = {name: function for name, function in functions.items() if hasattr(function, "oracle")}
    missing = [name for name in ("cases", "score") if name not in functions]
    if missing or not 1 <= len(components) <= MOST:
        raise MedfusionError(
            f"{path}: not a system",
            **({"missing": some(missing)} if missing else {}),
            components=f"{some(components) or 'none'}; 1 to {MOST} can be judged",
        )
    needs: dict[str, tuple[str, ...]] = {}
    oracle_needs: dict[str, tuple[str, ...]] = {}
    for name, function in [*components.items(), ("score", functions["score"])]:
        taken = _taken(function)
        of_oracle = _taken(function.oracle) if name in components else ()
        unknown = sorted({*taken, *of_oracle} - set(needs))
        if unknown:
            raise MedfusionError(f"{path}: {name} takes what no component above it makes", unknown=some(unknown))
        needs[name], oracle_needs[name] = taken, of_oracle
    return System(components, needs, oracle_needs, functions["cases"], functions["score"])


def _taken(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "case")


def list_cases(system: System) -> list[Any]:
    """What ``cases`` returns.

    Raises
    ------
    MedfusionError : it raised an exception, or returns none, or one without a name and a patient, or two of one name.
    """
    try:
        found = list(system.cases())
        names = [str(case.name) for case in found if case.patient]
    except Exception as error:
        raise MedfusionError("cases() failed", reason=f"{type(error).__name__}: {error}") from error
    if not found or len(set(names)) < len(found):
        raise MedfusionError("cases() has to return cases, each with a patient and a name of its own", cases=len(found))
    return found


def run_case(system: System, case: Any) -> Iterator[dict[str, Any]]:
    """Rows (case, patient, fixed, and what ``score`` returns) of one case, with every subset replaced.

    A component runs once for every different input that it can get, and not for every subset.

    Raises
    ------
    MedfusionError : a component, oracle or score raised an exception; case, function and subset are named.
    """
    made: dict[tuple[str, int], Any] = {}
    for subset in range(2 ** len(system.names)):
        known = {"case": str(case.name), "patient": case.patient, "fixed": subset_name(subset, system.names)}
        scored = _call(system, "score", system.score, system.needs["score"], case, subset, made)
        if not isinstance(scored, Mapping) or not scored or known.keys() & scored.keys():
            raise MedfusionError(
                f"{case.name}: score() has to return a dictionary, column: value, without {some(known)}",
                returned=repr(scored)[:200],
            )
        yield {**known, **scored}


def _output(system: System, name: str, case: Any, subset: int, made: dict[tuple[str, int], Any]) -> Any:
    """Of a component, computed or remembered: it depends on the oracles among itself and what it needs alone."""
    key = (name, subset & _upstream(system, name, subset))
    if key not in made:
        function, needs = system.components[name], system.needs[name]
        if _perfect(system, name, subset):
            function, needs = function.oracle, system.oracle_needs[name]  # type: ignore[attr-defined]
        made[key] = _call(system, name, function, needs, case, subset, made)
    return made[key]


def _perfect(system: System, name: str, subset: int) -> bool:
    return bool(subset >> system.names.index(name) & 1)


def _upstream(system: System, name: str, subset: int) -> int:
    """The components on which the output of ``name`` depends in this subset, itself included, as a subset."""
    needs = system.oracle_needs if _perfect(system, name, subset) else system.needs
    found = 1 << system.names.index(name)
    for each in needs[name]:
        found |= _upstream(system, each, subset)
    return found


def _call(
    system: System,
    name: str,
    function: Callable[..., Any],
    needs: tuple[str, ...],
    case: Any,
    subset: int,
    made: dict[tuple[str, int], Any],
) -> Any:
    taken = {each: _output(system, each, case, subset, made) for each in needs}
    if "case" in inspect.signature(function).parameters:
        taken["case"] = case
    try:
        return function(**taken)
    except (Exception, SystemExit) as error:
        raise MedfusionError(
            f"{case.name}: {name} failed",
            reason=f"{type(error).__name__}: {error}",
            perfect=subset_name(subset, system.names) or "none",
        ) from error
