"""Operations on a cluster: allocation, rendezvous, watchdog, network interfaces, fault injection, status of a run."""
