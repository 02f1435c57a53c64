"""The command line: each command parses, calls one function, prints. Nothing else imports from here."""

import gc

# A command that is over in a tenth of a second need not search for garbage while it imports its modules.
gc.set_threshold(50_000)
