"""How many guesses pay: what a pass costs here beside a step of plain decoding, and how often guesses stand."""

from __future__ import annotations

from dataclasses import dataclass

_GAIN = 1.02  # what less gain than this is, is noise
_WEIGHT = 0.1  # of a new time among those before it
_STEPS = 3  # plain steps that are timed before passes are compared with them
_LONGEST = 32.0  # plain steps that a pass, with the reading of a prompt before it, is taken for at most
_SPENT = 0.01  # of the tokens: what looking again may cost
_DEBT = 24.0  # tokens lost at which guesses are given up for now, whatever their rate says
_REFRESH = 64  # passes after which a plain step is timed again


@dataclass(frozen=True)
class Costs:
    """Of a pass, in steps of plain decoding: what it costs beyond one whatever it judges (`fixed`), for each position that
    it judges in a row, and for each guess.
    """

    position: float = 0.05
    guess: float = 0.0
    fixed: float = 0.0

    def slope(self, rows: int) -> float:
        """What one more guess for each of `rows` rows costs."""
        return self.position * rows + self.guess

    def line(self, rows: int = 1) -> tuple[float, float]:
        """(a, b): a pass over `rows` rows with k guesses each takes a + b * k plain steps of as many rows."""
        return 1 + self.fixed, self.slope(rows)


def best_count(rate: float, most: int, line: tuple[float, float]) -> int:
    """The number of guesses, up to `most`, that promises the most tokens for the time; 0 where plain decoding is as fast.

    `rate`: the chance that a guess stands, given that those before it did; `line`: `Costs.line`. Source: Leviathan et al. 2022
    (arXiv:2211.17192), section 3.
    """
    best, gain = 0, _GAIN
    start, slope = line
    tokens = stands = 1.0
    for count in range(1, most + 1):
        stands *= rate
        tokens += stands
        speed = tokens / max(start + count * slope, 1e-3)
        if speed > gain:
            best, gain = count, speed
    return best


class Probe:
    """When to look again whether guesses pay, while they do not: after `first` tokens, then after twice as many each time,
    up to `longest`; `passes` passes at a time.
    """

    def __init__(self, first: int = 16, longest: int = 256, passes: int = 1) -> None:
        self._first, self._longest, self._passes = first, longest, passes
        self._interval, self._skipped, self._left = first, 0, 0

    def left(self) -> int:
        """Tokens for which `due` would say no."""
        return 0 if self._left else max(self._interval - self._skipped - 1, 0)

    def skip(self, tokens: int) -> None:
        """So many tokens came without a question."""
        self._skipped += tokens

    def paid(self) -> None:
        """Guesses pay."""
        self._interval, self._skipped = max(self._first, self._interval // 2), 0

    def due(self) -> bool:
        """Whether to guess at a token for which guesses do not pay."""
        if self._left:
            self._left -= 1
            return True
        self._skipped += 1
        if self._skipped < self._interval:
            return False
        self._skipped, self._left = 0, self._passes - 1
        self._interval = min(2 * self._interval, self._longest)
        return True


class Pace:
    """Costs as they are measured while requests run. `fixed` is learned for each number of rows: it takes up what the
    costs measured before do not know of (other work on the machine, wider batches).
    """

    def __init__(self, costs: Costs, plain: float | None = None) -> None:
        """`plain`: seconds of a plain step of one row, where they are known."""
        self._costs = costs
        self._plain: dict[int, float] = {} if plain is None else {1: plain}
        self._fixed: dict[int, float] = {}
        self._passes: dict[int, int] = {}  # since the last plain step
        self._steps: dict[int, int] = {} if plain is None else {1: _STEPS}  # plain ones that were timed
        self._known: dict[int, int] = {}  # passes that `_fixed` is made of

    def note(self, rows: int, count: int, seconds: float) -> None:
        """A step of `rows` rows with up to `count` guesses each (0: a plain step) took `seconds`."""
        plain = self._plain.get(rows)
        if count == 0:
            self._passes[rows] = 0
            self._steps[rows] = self._steps.get(rows, 0) + 1
            if plain is None:
                self._plain[rows] = seconds
            else:  # other work on the machine makes steps longer, nothing makes them shorter
                self._plain[rows] = _moved(plain, min(seconds, 2 * plain), 0.5 if seconds < plain else _WEIGHT)
        elif plain is not None:
            self._passes[rows] = self._passes.get(rows, 0) + 1
            excess = seconds / plain - 1 - count * self._costs.slope(rows)
            known = self._fixed.get(rows, self._costs.fixed)
            count = self._known[rows] = self._known.get(rows, 0) + 1
            self._fixed[rows] = _moved(known, min(excess, known + 1), max(_WEIGHT, 1 / (count + 1)))

    def lost(self, rows: int, seconds: float, accepted: int) -> float:
        """Plain tokens that a pass over `rows` rows has cost more than it brought, `accepted` guesses having stood."""
        plain = self._plain.get(rows)
        return 0.0 if plain is None else rows * (min(seconds / plain, _LONGEST) - 1) - accepted

    def line(self, rows: int) -> tuple[float, float]:
        """As `Costs.line`, as measured last."""
        return 1 + self._fixed.get(rows, self._costs.fixed), self._costs.slope(rows)

    def stale(self, rows: int) -> bool:
        """Whether a plain step of so many rows is to be timed: too few were, or none for long."""
        return self._steps.get(rows, 0) < _STEPS or self._passes.get(rows, 0) >= _REFRESH


def _moved(known: float, new: float, weight: float = _WEIGHT) -> float:
    return known + weight * (new - known)


class Budget:
    """What guesses that did not pay have cost, in tokens of plain decoding, less what has been earned since: `_SPENT` of each
    token. With a debt nobody looks again whether guesses pay; with a large one none are made at all.
    """

    def __init__(self) -> None:
        self._debt = 0.0
        self._closed = False

    def earn(self, tokens: int) -> None:
        if self._debt > 0.0:
            self._debt -= _SPENT * tokens

    def spend(self, lost: float) -> None:
        """A pass has lost so much; below 0: won."""
        self._debt = max(self._debt + lost, 0.0)
        self._closed = self._closed or self._debt > _DEBT

    @property
    def spent(self) -> bool:
        return self._debt > 0.0

    @property
    def exhausted(self) -> bool:
        """Whether too much was lost, and it is not earned yet."""
        self._closed = self._closed and self._debt > 0.0
        return self._closed


class Progress:
    """What speculation knows of one sequence: how many guesses stood (recent passes counting most), when to look again,
    and where its n-grams were.
    """

    def __init__(self, rate: float = 0.7, probe: Probe | None = None) -> None:
        """`rate`: where one begins."""
        self.accepted, self.judged = 2.0 * rate, 2.0
        self.probe = probe or Probe()
        self.idle = False  # guesses do not pay, as far as is known: nothing changes that but a probe
        self.wake = 0  # tokens, prompt included, before which nothing is to be asked
        self._asked = 0  # tokens at the last question
        self._ngrams: dict[int, tuple[dict[tuple[int, ...], int], int]] = {}

    @property
    def rate(self) -> float:
        return self.accepted / self.judged

    def due(self, length: int, rows: int, earned: bool) -> bool:
        """Whether to look again, idle and with `length` tokens; `rows` sequences share the probe. Unless it is `earned`, not now.
        Sets `wake`.
        """
        self.probe.skip(max(length - self._asked - 1, 0) if self._asked else 0)
        self._asked = length
        due = earned and self.probe.due()
        self.wake = 0 if due else length + 1 + (self.probe.left() // rows if earned else 16)
        return due

    def note(self, accepted: int, judged: int) -> None:
        """`judged` guesses were looked at, of which all, or all but the last, stood."""
        self.idle, self._asked = False, 0
        self.accepted, self.judged = 0.9 * self.accepted + accepted, 0.9 * self.judged + judged

    def num_guesses(self, most: int, line: tuple[float, float]) -> int:
        """How many guesses to make, given what passes cost (`Costs.line`); now and then one, where none pay."""
        best = best_count(self.rate, most, line)
        if best:
            self.probe.paid()
            return best
        self.idle = True
        return 1 if most > 0 and self.probe.due() else 0

    def ngrams(self, size: int, tokens: list[int]) -> dict[tuple[int, ...], int]:
        """Each run of `size` tokens that something follows -> where its latest occurrence ends."""
        found, done = self._ngrams.get(size, ({}, size))
        for end in range(done, len(tokens)):
            found[tuple(tokens[end - size : end])] = end
        self._ngrams[size] = found, max(done, len(tokens))
        return found
