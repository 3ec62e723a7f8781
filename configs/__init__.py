"""The configurations that ship with the project: one file is one run; ``common.config.find`` looks them up here."""
