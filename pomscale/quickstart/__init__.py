"""The quickstarts: the whole life of a run on a laptop's CPU, by the commands one uses all day."""
