"""Which requests go to a new engine core, and when: all at once, but those that may have killed the last one singly.

engine core dies ─▶ its requests wait ─▶ READY ─▶ submitted again, each continues after its last token
                                           │
                     dies again before a token of some of them came: these are suspects
                       they wait until the others run, then are tried one at a time
                       one that was the only suspect at two deaths is convicted: it ends with an error, alone

One such death is no proof: whoever kills engine cores from outside hits someone who is under trial, too. So a suspect
that lost a trial is tried again after all others.
"""

from collections.abc import Callable, Collection

from frontend.live_request import LiveRequest

TRIALS_TO_LOSE = 2


def on_engine_gone(requests: Collection[LiveRequest]) -> LiveRequest | None:
    """Note that the engine core died with the submitted ones of `requests`; the one that is convicted, if any."""
    in_flight = [request for request in requests if request.submitted]
    suspects = [request for request in in_flight if request.num_crashes]
    for request in in_flight:
        request.submitted = False
        request.num_crashes += 1
    if len(suspects) != 1:
        return None
    suspects[0].num_trials_lost += 1
    return suspects[0] if suspects[0].num_trials_lost >= TRIALS_TO_LOSE else None


def resubmit(requests: Collection[LiveRequest], submit: Callable[[LiveRequest], None]) -> None:
    """Submit what waits and may go now. Call it when the engine core is ready, and when a request under trial moved.

    `submit` sends a request to the engine core and marks it submitted.
    """
    waiting = [request for request in requests if not request.submitted]
    for request in waiting:
        if not _is_suspect(request):
            submit(request)
    suspects = [request for request in waiting if _is_suspect(request)]
    if suspects and not any(request.submitted and request.num_crashes for request in requests):
        submit(min(suspects, key=lambda request: request.num_trials_lost))


def _is_suspect(request: LiveRequest) -> bool:
    """The engine core died twice with it, and others, before a token came."""
    return request.num_crashes > 1
