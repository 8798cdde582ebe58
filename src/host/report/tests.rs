use model::Code;
use wire::launch::CpuReport;

use super::*;

fn report(missing: &[&str], linux: LinuxSupport) -> KvmReport {
    KvmReport {
        api_version: 12,
        extensions: Vec::new(),
        missing: missing.iter().map(|&name| name.to_owned()).collect(),
        linux,
        kernel_mode_ips: 1_000_000,
        exit_ns: 8000,
        landlock_abi: 4,
        tsc_khz: None,
        cpu: CpuReport::default(),
    }
}

#[test]
fn kvm_is_good_lesser_or_failed_by_what_the_probe_found() {
    let crawls = LinuxSupport::No("kernel mode is emulated".to_owned());
    let cases = [
        (Ok(()), None, CheckStatus::Ok),
        (Ok(()), Some(report(&[], LinuxSupport::Yes)), CheckStatus::Ok),
        (Ok(()), Some(report(&[], crawls.clone())), CheckStatus::Degraded),
        (Ok(()), Some(report(&["KVM_CAP_IRQFD"], crawls)), CheckStatus::Failed),
        (Err(Error::new(Code::KvmUnavailable, "/dev/kvm is missing")), None, CheckStatus::Failed),
    ];
    for (launchable, report, expected) in cases {
        let probe = report.map(judge);
        let check = kvm_check(launchable, probe.as_ref());
        assert_eq!(check.status, expected, "{check:?} of {probe:?}");
    }
}

#[test]
fn a_host_that_lacks_extensions_runs_no_linux_whatever_the_instructions_do() {
    let probe = judge(report(&["KVM_CAP_IRQFD"], LinuxSupport::Yes));
    assert!(!probe.works && !probe.linux_guests);
}

#[test]
fn what_kvm_lacks_and_servers_would_use_is_named_with_what_is_lost() {
    let mut whole = report(&[], LinuxSupport::Yes);
    whole.extensions = vec![("STEAL_TIME".to_owned(), 1), ("NESTED_STATE".to_owned(), 0)];
    let check = features_check(&judge(whole.clone()));
    assert_eq!(check.status, CheckStatus::Ok, "{check:?}");
    whole.extensions[0].1 = 0;
    let check = features_check(&judge(whole));
    assert_eq!(check.status, CheckStatus::Degraded);
    assert!(check.detail.starts_with("without STEAL_TIME guests cannot tell"), "{check:?}");
    assert_eq!(
        (landlock_check(0).status, landlock_check(4).status),
        (CheckStatus::Degraded, CheckStatus::Ok)
    );
}

#[test]
fn the_worst_check_decides_the_health() {
    let check = |status| Check { name: String::new(), status, detail: String::new() };
    let (good, lesser, failed) =
        (check(CheckStatus::Ok), check(CheckStatus::Degraded), check(CheckStatus::Failed));
    assert_eq!(health(std::slice::from_ref(&good)), Health::Ok);
    assert_eq!(health(&[good.clone(), lesser.clone()]), Health::Degraded);
    assert_eq!(health(&[failed, good, lesser]), Health::Failing);
}

#[test]
fn a_trouble_that_two_networks_share_is_told_once() {
    let troubles = ["nft is missing".to_owned(), "nft is missing".to_owned()];
    assert_eq!(networks_check(troubles.iter()).detail, "nft is missing");
    assert_eq!(networks_check([].iter()).status, CheckStatus::Ok);
}
