# The profile's setup commands.
pip install --quiet omegaconf
