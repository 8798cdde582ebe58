use std::fs;

use super::*;

struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    fn new(whole: &str, devices: &[(&str, &str)]) -> Host {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ip_forward"), whole).unwrap();
        for (device, value) in devices {
            fs::create_dir_all(directory.path().join("conf").join(device)).unwrap();
            fs::write(directory.path().join(switch(device)), value).unwrap();
        }
        Host { directory }
    }

    fn forwarding(&self) -> Forwarding {
        Forwarding::new(self.directory.path().join("record"), self.directory.path())
    }

    fn value(&self, device: &str) -> String {
        fs::read_to_string(self.directory.path().join(switch(device))).unwrap()
    }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn what_was_switched_on_is_switched_off_again_and_nothing_else() {
    let host = Host::new("0\n", &[("eth0", "0\n"), ("wan.7", "1\n"), ("eth2", "0\n")]);
    let planned = host.forwarding().plan(&names(&["eth0", "wan.7"])).unwrap();
    assert_eq!(planned, ["eth0"]);
    host.forwarding().switch_on(&planned).unwrap();
    assert_eq!((host.value("eth0").as_str(), host.value("eth2").as_str()), ("1", "0\n"));
    // Another daemon, after a crash, knows it from the record although the switch is on.
    assert_eq!(host.forwarding().plan(&names(&["eth0", "wan.7"])).unwrap(), ["eth0"]);
    host.forwarding().restore().unwrap();
    assert_eq!((host.value("eth0").as_str(), host.value("wan.7").as_str()), ("0", "1\n"));
    host.forwarding().restore().unwrap();
}

#[test]
fn a_host_that_forwards_by_its_own_wish_is_left_alone() {
    let host = Host::new("0", &[("eth0", "0")]);
    host.forwarding().switch_on(&host.forwarding().plan(&names(&["eth0"])).unwrap()).unwrap();
    fs::write(host.directory.path().join("ip_forward"), "1").unwrap();
    assert!(host.forwarding().plan(&names(&["eth0"])).unwrap().is_empty());
    host.forwarding().restore().unwrap();
    assert_eq!(host.value("eth0"), "1");
}

#[test]
fn a_device_that_lost_its_default_route_is_switched_off_and_one_that_is_gone_is_no_trouble() {
    let host = Host::new("0", &[("eth0", "0"), ("eth1", "0")]);
    host.forwarding().switch_on(&host.forwarding().plan(&names(&["eth0"])).unwrap()).unwrap();
    assert_eq!(host.forwarding().plan(&names(&["eth1"])).unwrap(), ["eth1"]);
    assert_eq!(host.value("eth0"), "0");
    fs::remove_dir_all(host.directory.path().join("conf/eth1")).unwrap();
    host.forwarding().restore().unwrap();
}
