//! The command line as it is typed: what parses, what does not, and what each form means.
use clap::CommandFactory;
use model::server::Rate;

use super::*;

#[test]
fn the_definition_of_the_command_line_is_consistent() {
    Toft::command().debug_assert();
}

#[test]
fn every_command_and_option_has_a_help_text() {
    fn visit(command: &clap::Command, path: &str) {
        assert!(command.get_about().is_some() || path.is_empty(), "{path} has no help");
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{path} {} has no help", argument.get_id());
        }
        for sub in command.get_subcommands() {
            visit(sub, &format!("{path} {}", sub.get_name()));
        }
    }
    let mut command = Toft::command();
    command.build();
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        visit(sub, sub.get_name());
    }
}

#[test]
fn what_every_command_takes_stands_apart_from_its_own_options() {
    fn visit(command: &clap::Command) {
        for argument in
            command.get_arguments().filter(|one| !["help", "version"].contains(&one.get_id().as_str()))
        {
            let apart = argument.get_help_heading() == Some("Options of every command");
            assert_eq!(apart, argument.is_global_set(), "{} {}", command.get_name(), argument.get_id());
        }
        command.get_subcommands().for_each(visit);
    }
    let mut command = Toft::command();
    command.build();
    visit(&command);
}

#[test]
fn an_action_is_for_one_server_or_for_those_with_labels() {
    let parses = |line: &str| Toft::try_parse_from(line.split_whitespace()).is_ok();
    for verb in ["start", "stop", "reboot", "pause", "resume", "hibernate"] {
        assert!(parses(&format!("toft server {verb} web1")), "{verb}");
        assert!(parses(&format!("toft server {verb} -l env=test")), "{verb}");
        assert!(parses(&format!("toft server {verb} --selector env=test,!keep --wait")), "{verb}");
        assert!(!parses(&format!("toft server {verb}")), "{verb}");
        assert!(!parses(&format!("toft server {verb} web1 -l env=test")), "{verb}");
    }
    assert!(parses("toft server stop -l env=test --grace-s 0"));
}

#[test]
fn operations_are_found_by_their_resource_and_have_no_labels() {
    let parses = |line: &str| Toft::try_parse_from(line.split_whitespace()).is_ok();
    let id = "01900000-0000-7000-8000-000000000000";
    assert!(parses(&format!("toft operation list --resource {id} --sort -created_at --limit 5")));
    assert!(!parses("toft operation list -l env=test"));
    assert!(parses("toft server list -l env=test"));
}

#[test]
fn endpoints_are_read_in_every_form() {
    let tcp = |host: &str, port| Endpoint::Tcp { host: host.into(), port };
    let cases = [
        ("unix:/run/toftd.sock", Ok(Endpoint::Unix("/run/toftd.sock".into()))),
        ("/run/toftd.sock", Ok(Endpoint::Unix("/run/toftd.sock".into()))),
        ("http://127.0.0.1:8080", Ok(tcp("127.0.0.1", 8080))),
        ("http://[::1]:8080/", Ok(tcp("::1", 8080))),
        ("http://[::1]", Ok(tcp("::1", 80))),
        ("https://host.example", Ok(Endpoint::Tls { host: "host.example".into(), port: 443 })),
        ("ftp://x", Err(())),
        ("http://x:port", Err(())),
        ("http://", Err(())),
    ];
    for (text, expected) in cases {
        assert_eq!(text.parse::<Endpoint>().map_err(drop), expected, "{text}");
    }
}

#[test]
fn rates_take_a_burst_and_are_never_nothing() {
    let rate = |per_second, burst| Ok(Rate { per_second, burst });
    assert_eq!(target::byte_rate("100M"), rate(100 << 20, None));
    assert_eq!(target::byte_rate("1K:2k"), rate(1 << 10, Some(2 << 10)));
    assert_eq!(target::count_rate("5:6"), rate(5, Some(6)));
    for bad in ["", "0", "1:0", "0:1", "1:", ":1", "1:2:3", "1M", "-1"] {
        assert!(target::count_rate(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn sizes_take_binary_units() {
    let cases = [
        ("0", Ok(0)),
        ("4096", Ok(4096)),
        ("512M", Ok(512 << 20)),
        ("2GiB", Ok(2 << 30)),
        ("1t", Ok(1 << 40)),
        ("16777216T", Err(())),
        ("", Err(())),
        ("G", Err(())),
        ("1.5G", Err(())),
        ("-1", Err(())),
    ];
    for (text, expected) in cases {
        assert_eq!(target::size(text).map_err(drop), expected, "{text:?}");
    }
}

#[test]
fn bytes_are_printed_in_the_unit_that_fits() {
    let cases = [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1 MiB"), (1536, "1.5 KiB"), (5 << 40, "5 TiB")];
    for (count, expected) in cases {
        assert_eq!(output::bytes(count), expected);
    }
}

#[test]
fn labels_can_be_set_and_removed() {
    assert_eq!(target::label_change("a=b"), Ok(("a".into(), Some("b".into()))));
    assert_eq!(target::label_change("a="), Ok(("a".into(), Some(String::new()))));
    assert_eq!(target::label_change("a-"), Ok(("a".into(), None)));
    assert!(target::label_change("a").is_err());
}

fn problem(code: model::Code) -> model::Problem {
    model::Problem {
        kind: String::new(),
        title: code.title().into(),
        status: code.status(),
        detail: String::new(),
        instance: String::new(),
        code,
        request_id: String::new(),
        retryable: code.retryable(),
        errors: Vec::new(),
        allowed_actions: None,
        operation_id: None,
    }
}

#[test]
fn what_is_possible_is_told_once_and_only_if_something_is() {
    let report = |detail: &str, actions: &[&str]| {
        let allowed_actions = Some(actions.iter().map(|action| (*action).to_owned()).collect());
        let detail = detail.to_owned();
        Error::Problem(Box::new(model::Problem {
            detail,
            allowed_actions,
            ..problem(model::Code::WrongState)
        }))
        .report()
    };
    let both = ["start", "delete"];
    assert!(report("it is off", &both).contains("possible now: start, delete\n"));
    assert_eq!(report("it is off; possible are start, delete", &both).matches("start").count(), 1);
    assert!(!report("it is off", &[]).contains("possible"));
}

#[test]
fn exit_codes_follow_the_problem() {
    let exit = |code: model::Code| Error::Problem(Box::new(problem(code))).exit_code();
    use model::Code::*;
    let cases = [
        (Invalid, 2),
        (NotFound, 3),
        (WrongState, 4),
        (StaleEtag, 4),
        (Draining, 5),
        (NoCapacity, 6),
        (Timeout, 7),
        (Forbidden, 1),
    ];
    for (code, expected) in cases {
        assert_eq!(exit(code), expected, "{code:?}");
    }
}

#[test]
fn what_is_expected_of_a_move_stands_behind_how_far_it_is() {
    use model::operation::Progress;
    let known = Progress {
        bytes_per_s: Some(112 << 20),
        remaining_s: Some(12),
        expected_downtime_ms: Some(43),
        throttle_percent: Some(30),
        ..Progress::default()
    };
    let unhindered = Progress { throttle_percent: Some(0), remaining_s: Some(150), ..known.clone() };
    let cases = [
        (known, ", 112 MiB/s, 12 s left, would stand still 43 ms, held back 30%"),
        (unhindered, ", 112 MiB/s, 3 min left, would stand still 43 ms"),
        (Progress { remaining_s: Some(90_000), ..Progress::default() }, ", 25 h left"),
        (Progress { bytes_done: Some(5), ..Progress::default() }, ""),
    ];
    for (progress, text) in cases {
        assert_eq!(operation::expected(&progress), text);
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_stays_away_is_waited_for_a_while() {
    let nowhere = Endpoint::Unix("/nonexistent".into());
    let mut context = Context {
        client: Client::new(nowhere, None, None, false, None).unwrap(),
        format: Format::Table,
        wait: true,
        wait_timeout: std::time::Duration::from_secs(900),
    };
    let operation: model::operation::Operation = serde_json::from_value(serde_json::json!({
        "id": "01900000-0000-7000-8000-000000000000", "kind": "server.stop", "state": "running",
        "progress": { "phase": "", "percent": 0 }, "resources": [], "generation": 1,
        "created_at": "2026-01-01T00:00:00Z", "cancellable": true,
    }))
    .unwrap();
    let begin = tokio::time::Instant::now();
    let lost = wait::until_end(&context, &operation).await.unwrap_err();
    assert_eq!((begin.elapsed().as_secs(), lost.exit_code()), (limits::RETURN_TIMEOUT.as_secs(), 5));
    let report = lost.report();
    assert!(report.contains("/nonexistent: No such file"), "{report}");
    assert!(report.ends_with("to go on waiting: toft operation wait 01900000-0000-7000-8000-000000000000\n"));
    // It ends when it was told to, though the daemon may still come back.
    context.wait_timeout = limits::RETURN_TIMEOUT / 2;
    assert_eq!(wait::until_end(&context, &operation).await.unwrap_err().exit_code(), 7);
}
