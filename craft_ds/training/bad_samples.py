"""Bad samples in a run: the run stops on all ranks, or logs each of them once."""

from collections.abc import Callable, Sequence

from craft_ds.config.configs import OnBadSample
from craft_ds.data.checked_samples import BadSample
from craft_ds.data.task_data import advise
from craft_ds.distributed.collectives import gather_objects
from craft_ds.errors import UserError


class BadSampleLog:
    """Stops the run at a bad sample, or logs every bad sample once.

    A rank that meets a bad sample takes a replacement and finishes its pass, so that the ranks stay in step;
    the number of replacements is summed in the pass's own all-reduce.

    Args:
        on_bad_sample: The flag.
        say: Logs a line on rank 0.
        before_error: Called on all ranks before the run stops, to finish what is being saved.
    """

    def __init__(
        self, on_bad_sample: OnBadSample, say: Callable[[str], None], before_error: Callable[[], None]
    ) -> None:
        self._on_bad_sample, self._say, self._before_error = on_bad_sample, say, before_error
        self._said: set[tuple[str, int, int]] = set()

    def settle(self, replaced: float, found: Sequence[BadSample]) -> None:
        """Stop or log after a pass over samples. Collective if `replaced` is positive: call on all ranks.

        Args:
            replaced: Samples of all ranks that were replaced in this pass; the same on all ranks.
            found: The bad samples of this rank.

        Raises:
            UserError: With `--on_bad_sample=error`, the same on all ranks; names the first bad sample.
        """
        if replaced <= 0:
            return
        everyones = [error for of_rank in gather_objects(list(found)) for error in of_rank]
        if self._on_bad_sample == "error":
            self._before_error()
            raise UserError(advise(everyones[0]))
        for error in everyones:
            place = (error.dataset, error.episode, error.frame)
            if place not in self._said:
                self._said.add(place)
                self._say(f"bad sample replaced: {error}")
