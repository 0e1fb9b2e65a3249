"""The mathematics of moments and of sums that no split changes; knows neither ranks nor layers."""
