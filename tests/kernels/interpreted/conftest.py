import os

# Collected by the process that test_triton_interpreter.py starts, and by nobody else.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_triton.py"]
