"""A load test of any server that speaks OpenAI's API: what to send and when, what came back, and what it cost."""
