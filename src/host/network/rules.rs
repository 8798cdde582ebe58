//! The text of Toft's nftables rules. Pure: `nft` applies it; a golden file and tests with real frames hold it.
//! All of it lies in the tables `inet toft` and `bridge toft`; nothing else is read, changed or flushed.
//!
//! `bridge toft` sees each frame as it leaves a guest, before the bridge or the host does anything with it. It
//! passes ARP and IPv4 with the sender's own addresses, and of ARP probes those for its own address, because who hears one
//! for his may give it up (RFC 5227, section 2.1.1). It drops the rest: IPv6 (networks are IPv4), VLAN tags (they would hide
//! what is inside), anything from a tap that is not in the sets. Each chain names what may pass and drops the rest, because
//! an expression that cannot be read, as in a frame cut short or one that lies about its length, matches nothing: IPv4
//! passes when its protocol was read and is no answer of a DHCP server and no question to one in another's name, or when it
//! is a later part of a datagram, which is worth nothing without the first. For whom a client asks is in the question itself
//! (`chaddr`, RFC 2131, section 2): 48 bits, 288 bits after the UDP header's begin, for which `nft` has no name and no type. (Two
//! neighbouring fields are never compared with `!=` in one rule: `nft` makes one comparison of both out of it.)
//!
//! Frames to 01:80:C2:00:00:0x, which bridges must not pass on (IEEE 802.1D, table 7-10), the kernel would hand to the
//! port itself, without `prerouting`. `links` has ports send them through it; `to_bridge` catches what a port without
//! that would let by, and `inet toft` drops whatever comes from a port. It also decides what may pass through the host and
//! what may reach it: DHCP, DNS and ping at the gateway of the guest's own network. At its other addresses the host may serve
//! others. Of connections only what answers who began them passes as a part of one: what began when these rules were not in force
//! would go on otherwise. What the one who began it sends is looked at as if it were the first.
//!
//! Where a network goes on behind a device of the host, the other hosts there have the same gateway, address for address,
//! and each is its own servers' alone: what comes in through the device reaches servers, never the host, and what the host
//! says, to DHCP's clients say, goes to servers, never out through the device. Nobody there is heard as a gateway or as a
//! DHCP server, and no server's question for one goes there. Devices are named by their numbers: one that is renamed, or
//! that has several names, is meant all the same. What else is on such a bridge passes nothing.

use std::fmt::Write;

use model::network::NetworkKind;

use super::mac::{BRIDGE_PREFIX, TAP_PREFIX};
use super::plumbing::{Foreign, Port, Wanted};

/// Both tables, complete, in place of what they were. One transaction: there is no moment without rules.
/// `uplinks` are devices whose forwarding Toft switched on: through them the host forwards to Toft's networks
/// and to nothing else, as before.
pub fn ruleset(wanted: &Wanted, uplinks: &[String], foreign: &[Foreign]) -> String {
    let mut text = removal();
    bridge_table(&mut text, &wanted.ports, foreign);
    inet_table(&mut text, wanted, uplinks, foreign);
    text
}

/// Takes both tables away, whether they are there or not.
pub fn removal() -> String {
    "add table bridge toft\ndelete table bridge toft\nadd table inet toft\ndelete table inet toft\n"
        .to_owned()
}

/// A port's elements of each set; `elements` puts the same into rules that are in force.
fn elements(port: &Port) -> [(&'static str, String); 3] {
    let (tap, [a, b, c, d, e, f]) = (port.tap(), port.mac.0);
    [
        ("senders", format!("\"{tap}\" . {}", port.mac)),
        ("addresses", format!("\"{tap}\" . {}", port.ipv4)),
        ("clients", format!("\"{tap}\" . 0x{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}{f:02x}")),
    ]
}

fn bridge_table(text: &mut String, ports: &[Port], foreign: &[Foreign]) {
    let mut sets = [String::new(), String::new(), String::new()];
    for (at, separator) in ports.iter().zip(std::iter::once("").chain(std::iter::repeat(",\n            "))) {
        for (set, (_, element)) in sets.iter_mut().zip(elements(at)) {
            set.push_str(separator);
            set.push_str(&element);
        }
    }
    let [senders, addresses, clients] = sets.map(|set| match set.as_str() {
        "" => String::new(),
        set => format!("\n        elements = {{\n            {set}\n        }}"),
    });
    let (mut in_through, mut to_host, mut out_through, mut from_host) = Default::default();
    let line = |text: &mut String, rule: String| text.push_str(&format!("        {rule}\n"));
    for Foreign { index, gateway } in foreign {
        line(&mut to_host, format!("iif {index} counter drop"));
        line(&mut from_host, format!("oif {index} counter drop"));
        let Some((mac, ipv4)) = gateway else {
            line(&mut in_through, format!("iif {index} counter drop"));
            line(&mut out_through, format!("oif {index} counter drop"));
            continue;
        };
        line(&mut in_through, format!("iif {index} ether saddr {mac} counter drop"));
        line(&mut in_through, format!("iif {index} ether type arp arp saddr ip {ipv4} counter drop"));
        line(&mut in_through, format!("iif {index} jump from_device"));
        line(&mut out_through, format!("oif {index} ether type ip udp dport 67 counter drop"));
    }
    let _ = write!(
        text,
        r#"
table bridge toft {{
    set senders {{
        type ifname . ether_addr{senders}
    }}
    set addresses {{
        type ifname . ipv4_addr{addresses}
    }}
    set clients {{
        typeof iifname . @th,288,48{clients}
    }}
    chain from_port {{
        type filter hook prerouting priority -300; policy accept;
        iifname "{TAP_PREFIX}*" jump from_guest
{in_through}    }}
    chain from_device {{
        ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 counter drop
        ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 accept
        ether type ip ip frag-off & 0x1fff != 0 accept
        ether type ip meta l4proto != udp accept
        ether type ip udp sport != 67 accept
        counter drop
    }}
    chain from_guest {{
        ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 counter drop
        iifname . ether saddr @senders ether type arp goto arp_from_guest
        iifname . ether saddr @senders ether type ip goto ipv4_from_guest
        counter drop
    }}
    chain arp_from_guest {{
        arp htype != 1 counter drop
        arp ptype != ip counter drop
        arp hlen != 6 counter drop
        arp plen != 4 counter drop
        iifname . arp saddr ether @senders iifname . arp saddr ip @addresses accept
        iifname . arp saddr ether @senders arp operation request arp saddr ip 0.0.0.0 iifname . arp daddr ip @addresses accept
        counter drop
    }}
    chain ipv4_from_guest {{
        ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 iifname . @th,288,48 @clients accept
        iifname . ip saddr @addresses goto own_ipv4_from_guest
        counter drop
    }}
    chain own_ipv4_from_guest {{
        ip frag-off & 0x1fff != 0 accept
        meta l4proto != udp accept
        udp dport 67 goto dhcp_from_guest
        udp sport != 67 accept
        counter drop
    }}
    chain dhcp_from_guest {{
        udp sport != 67 iifname . @th,288,48 @clients accept
        counter drop
    }}
    chain to_bridge {{
        type filter hook input priority -300; policy accept;
        iifname "{TAP_PREFIX}*" ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 counter drop
{to_host}    }}
    chain through_bridge {{
        type filter hook forward priority -300; policy accept;
{out_through}    }}
    chain from_host {{
        type filter hook output priority -300; policy accept;
{from_host}    }}
}}
"#
    );
}

fn inet_table(text: &mut String, wanted: &Wanted, uplinks: &[String], foreign: &[Foreign]) {
    let mut to_gateway = String::new();
    let mut through = String::new();
    let mut masquerade = String::new();
    for segment in &wanted.segments {
        let (bridge, cidr) = (&segment.bridge, segment.cidr);
        let gateway = cidr.gateway();
        let _ = writeln!(to_gateway, "        iifname \"{bridge}\" ip daddr {gateway} goto guest_to_gateway");
        let _ = writeln!(through, "        iifname \"{bridge}\" oifname \"{bridge}\" accept");
        if segment.kind == NetworkKind::Nat {
            let _ = writeln!(
                through,
                "        iifname \"{bridge}\" oifname != \"{BRIDGE_PREFIX}*\" ip saddr {cidr} accept\n        iifname \
                 != \"{BRIDGE_PREFIX}*\" oifname \"{bridge}\" ip daddr {cidr} ct state \
                 established,related ct direction reply accept"
            );
            let _ = writeln!(
                masquerade,
                "        oifname != \"{BRIDGE_PREFIX}*\" ip saddr {cidr} ip daddr != {cidr} masquerade"
            );
        }
    }
    // Writing to a String cannot fail.
    let mut from_device = String::new();
    for Foreign { index, .. } in foreign {
        let _ = writeln!(from_device, "        iif {index} counter drop");
    }
    for uplink in uplinks {
        let _ = writeln!(through, "        iifname \"{uplink}\" counter drop");
    }
    let _ = write!(
        text,
        r#"
table inet toft {{
    chain to_host {{
        type filter hook input priority 0; policy accept;
        iifname "{TAP_PREFIX}*" counter drop
{from_device}        iifname "{BRIDGE_PREFIX}*" goto guest_to_host
    }}
    chain guest_to_host {{
        ct state established,related ct direction reply accept
        meta nfproto != ipv4 counter drop
{to_gateway}        ip daddr 255.255.255.255 udp dport 67 accept
        counter drop
    }}
    chain guest_to_gateway {{
        udp dport {{ 53, 67 }} accept
        tcp dport 53 accept
        icmp type echo-request accept
        counter drop
    }}
    chain through_host {{
        type filter hook forward priority 0; policy accept;
        iifname "{TAP_PREFIX}*" counter drop
{from_device}{through}        iifname "{BRIDGE_PREFIX}*" counter drop
        oifname "{BRIDGE_PREFIX}*" counter drop
    }}
    chain leaving {{
        type nat hook postrouting priority 100; policy accept;
{masquerade}    }}
}}
"#
    );
}
