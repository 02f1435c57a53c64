"""How tests kill a client in the middle of what it does."""

# Lines before a script's own. Its first two arguments are when (before, after) and the function at whose call it dies.
DIES = """
import importlib, os, signal, sys
when, where = sys.argv.pop(1), sys.argv.pop(1)
parts = where.split(".")
for cut in range(len(parts) - 1, 0, -1):
    try:
        owner = importlib.import_module(".".join(parts[:cut]))
        break
    except ImportError:
        pass
for name in parts[cut:-1]:
    owner = getattr(owner, name)
real = getattr(owner, parts[-1])
def deadly(*arguments, **more):
    if when == "after":
        real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, parts[-1], deadly)
"""
