"""vLLM on the CPU, kept alive: python vllm_child.py FOLDER DTYPE. Imports vllm and the standard library only."""

from __future__ import annotations

import sys

from answering import answers, serve


def main() -> None:
    answer = answers()  # before vllm prints anything
    from vllm import LLM, SamplingParams

    folder, dtype = sys.argv[1:]
    llm = LLM(folder, dtype=dtype, max_model_len=2048, max_num_seqs=256, enable_prefix_caching=False)

    def run(prompts: list[list[int]], tokens: int) -> None:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == tokens for o in outputs), "vLLM gave fewer tokens than asked for"

    serve(answer, run)


if __name__ == "__main__":
    main()
