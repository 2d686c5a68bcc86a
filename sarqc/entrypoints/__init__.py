"""One public function for each verb: the only place that knows all rooms below."""
