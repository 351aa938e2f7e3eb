"""A step's outputs as one message: columns for ordinary tokens, a message each for all else. No grpc, no torch."""

from __future__ import annotations

from collections.abc import Iterable

from afd.rpc import attention_pb2 as pb
from afd.rpc.convert import output_to_proto
from afd.types import GenerateOutput


class StepWriter:
    """Writes the steps of one stream. It knows the handles of the stream's requests from `opened` until their last
    output or `closed`; a request without a handle is written in full. Not for several threads at once."""

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}

    def opened(self, request_id: str, handle: int) -> None:
        """A request came. A request_id that is in use keeps its handle: the engine will refuse the second request."""
        if handle:
            self._handles.setdefault(request_id, handle)

    def closed(self, request_id: str) -> None:
        """A request ended, or its outputs are not wanted any more. Unknown ids are ignored."""
        self._handles.pop(request_id, None)

    def write(self, outputs: Iterable[GenerateOutput]) -> pb.StepOutputs:
        """The message; reading it gives every request's outputs in their order here."""
        handles: list[int] = []
        token_ids: list[int] = []
        rest: list[pb.Output] = []
        in_full: set[str] = set()  # a token that comes after one of these may not overtake it
        for output in outputs:
            request_id = output.request_id
            handle = self._handles.get(request_id)
            if handle is None or request_id in in_full or not _ordinary(output):
                rest.append(output_to_proto(output))
                in_full.add(request_id)
                if output.finish_reason is not None:
                    self.closed(request_id)
            else:
                handles.append(handle)
                token_ids.append(output.tokens[0].token_id)
        return pb.StepOutputs(outputs=rest, handles=handles, token_ids=token_ids)


def _ordinary(output: GenerateOutput) -> bool:
    """Whether a handle and a token id say all there is to say."""
    return (
        output.finish_reason is None
        and len(output.tokens) == 1
        and output.tokens[0].logprob is None
        and output.stop_token_id is None
        and not output.error
        and not output.client_error
        and not output.cached_tokens
        and output.queue_s is None
        and not output.prompt
    )
