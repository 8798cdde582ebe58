use super::guest::Findings;
use super::*;

fn findings(loop_ips: u64, cmpxchg16b: Option<&str>) -> Findings {
    Findings { loop_ips, exit_ns: 1_000, cmpxchg16b: cmpxchg16b.map(str::to_owned), tsc_khz: None }
}

#[test]
fn linux_is_promised_only_where_its_instructions_run_and_fast() {
    assert_eq!(judge(&findings(1_000_000_000, None)), LinuxSupport::Yes);
    let LinuxSupport::No(why) = judge(&findings(1_000_000_000, Some("it raised an exception"))) else {
        panic!()
    };
    assert!(why.contains("cmpxchg16b: it raised an exception"), "{why}");
    let LinuxSupport::No(why) = judge(&findings(1_000, None)) else { panic!() };
    assert!(why.contains("1000 instructions a second"), "{why}");
}
