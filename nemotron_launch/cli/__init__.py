"""The command line: each command parses, calls one function, prints. Nothing else imports from here."""
