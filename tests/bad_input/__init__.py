"""A package, so that its module hici is never found in place of the distribution's."""
