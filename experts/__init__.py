"""What an expert is, and each way to run one. Adding a backend: a file, a line here, a test."""

BACKENDS = {
    "vllm": "experts.vllm:VllmEngine",
    "serve": "experts.serve_handle:ServeEngine",
    "openai": "experts.openai_http:OpenAIEngine",
    "recorded": "experts.recorded:RecordedEngine",
    "fake": "experts.fake:FakeEngine",
}
