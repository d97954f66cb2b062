"""`python -m jaxllm.replay`: looks at the schedule that an engine recorded, step by step.

python -m jaxllm.serve MODEL --record-schedule schedule.jsonl.gz
python -m jaxllm.replay schedule.jsonl.gz                       # in the terminal, with keys
python -m jaxllm.replay schedule.jsonl.gz --html schedule.html  # as a page
python -m jaxllm.replay schedule.jsonl.gz --policy sarathi,srtf # what would have happened
"""
