"""Many jobs from one TOML file, and the Pareto curve that they make.

`description` reads the file, `trials` makes jobs of it, `search` asks Optuna for more of them; `measuring` does one,
`local` and `cluster` do many of them at a time; `conduct` runs the whole and keeps it in a folder, `front` says which
trials nothing beats, `results`, `chart` and `page` show it. Nothing here imports Ray or Optuna before it is asked for.
"""
