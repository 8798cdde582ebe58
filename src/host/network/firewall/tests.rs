use super::*;

#[test]
fn only_foreign_chains_that_packets_of_servers_pass_are_looked_at() {
    let listing = r#"{"nftables": [
        {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
        {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter",
                   "hook": "forward", "prio": 0, "policy": "drop"}},
        {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "handle": 2, "type": "filter",
                   "hook": "input", "prio": 0, "policy": "drop"}},
        {"chain": {"family": "ip", "table": "filter", "name": "DOCKER", "handle": 3}},
        {"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter",
                   "hook": "forward", "prio": 0, "policy": "drop"}},
        {"chain": {"family": "inet", "table": "toft", "name": "through_host", "handle": 3, "type": "filter",
                   "hook": "forward", "prio": 0, "policy": "accept"}},
        {"chain": {"family": "inet", "table": "firewalld", "name": "filter_FORWARD", "handle": 9, "type": "filter",
                   "hook": "forward", "prio": 10, "policy": "accept"}}]}"#;
    let names: Vec<String> = foreign(listing).unwrap().iter().map(Chain::words).collect();
    assert_eq!(names, ["ip filter FORWARD", "inet firewalld filter_FORWARD"]);
    assert!(foreign("nonsense").is_err());
}

#[test]
fn a_chain_drops_the_rest_by_its_policy_or_its_last_rule() {
    let chain = |policy: &str, rules: &str| {
        format!(
            "table ip filter {{\n\tchain FORWARD {{\n\t\ttype filter hook forward priority filter; policy {policy};\n\
             {rules}\t}}\n}}\n"
        )
    };
    let cases = [
        (chain("drop", ""), true),
        (chain("drop", "\t\tiifname \"eth1\" accept\n"), true),
        (chain("accept", ""), false),
        (chain("accept", "\t\tiifname \"eth1\" drop\n"), false),
        (chain("accept", "\t\tct state established accept\n\t\tdrop\n"), true),
        (chain("accept", "\t\tcounter packets 3 bytes 252 drop\n"), true),
        (chain("accept", "\t\tcounter packets 3 bytes 252 accept\n"), false),
        (chain("accept", "\t\treject with icmpx admin-prohibited\n"), true),
        (chain("accept", "\t\tdrop\n\t\tiifname \"eth1\" accept\n"), false),
    ];
    for (rules, expected) in cases {
        assert_eq!(drops_the_rest(&rules), expected, "{rules}");
    }
}
