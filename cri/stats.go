package cri

// Stats is what the stats and metrics calls are answered from.
type Stats interface{}
