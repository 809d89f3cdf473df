"""FocusLLaVA as a model of lmms-eval, in process or through a served gateway; see docs/benchmarks-lmms-eval.md.

    registration   what lmms-eval finds through the entry point
    model          the model class: requests in batches, answers and their accounting out
    questions      a request's messages and generation kwargs -> a question and its sampling settings
    answering      a batch of questions -> answers, by the two stages in this process or by the gateway

Only `registration` and `model` import lmms-eval, which is no dependency of ours.
"""
