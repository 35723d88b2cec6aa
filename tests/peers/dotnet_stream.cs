// .NET's NegotiateStream, as client and as server, behind lines on stdin and stdout; see dotnet_stream.py, which runs it.
//
//     1 connect 7 2000                                               ->  1 ok
//     2 login 7 alice secret DOM host/server EncryptAndSign Identification  ->  2 ok True True True False Identification ...
//     3 echo 7 1000 1 32,64512                                       ->  3 ok 0.123
//
// The first word numbers the request, and its answer has it too: answers come when they are ready, each request runs in a
// thread of its own, so that one may block as long as it likes. Texts and bytes are in hex, "-" is an empty one and "*" none.
// Instead of "ok", "error" is followed by the exception and those inside it, each as type,HResult,NativeErrorCode,message.
//
// All is done as the class's documentation has it: NegotiateStream around the NetworkStream; AuthenticateAs...; one reader
// and one writer; Dispose. Written in the C# that Mono's compiler knows.

using System;
using System.Collections.Concurrent;
using System.ComponentModel;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Security.Principal;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

static class Words
{
    public static byte[] Bytes(string word)
    {
        if (word == "-") return new byte[0];
        return Enumerable.Range(0, word.Length / 2).Select(i => Convert.ToByte(word.Substring(2 * i, 2), 16)).ToArray();
    }

    public static string Text(string word) => word == "*" ? null : Encoding.UTF8.GetString(Bytes(word));

    public static string Of(byte[] bytes, int count) =>
        count == 0 ? "-" : BitConverter.ToString(bytes, 0, count).Replace("-", "");

    public static string Of(string text)
    {
        if (text == null) return "*";
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        return Of(bytes, bytes.Length);
    }

    public static string Of(Exception exception)
    {
        var words = new StringBuilder("error");
        for (Exception e = exception; e != null; e = e.InnerException)
        {
            var win32 = e as Win32Exception;
            string native = win32 == null ? "*" : win32.NativeErrorCode.ToString();
            words.Append($" {e.GetType().FullName},{e.HResult},{native},{Of(e.Message)}");
        }
        return words.ToString();
    }

    public static string Of(NegotiateStream stream)
    {
        IIdentity remote = stream.RemoteIdentity;
        return $"ok {stream.IsAuthenticated} {stream.IsEncrypted} {stream.IsSigned} {stream.IsMutuallyAuthenticated}"
            + $" {stream.ImpersonationLevel} {Of(remote.AuthenticationType)} {Of(remote.Name)}";
    }

    public static T Choice<T>(string word) => (T)Enum.Parse(typeof(T), word);
}

sealed class Client
{
    readonly TcpClient tcp = new TcpClient();
    NegotiateStream stream;

    public Client(int port)
    {
        tcp.Connect(IPAddress.Loopback, port);
        tcp.NoDelay = true;
        Renew();
    }

    // The NegotiateStream leaves the connection open, so that another one may have it, when a login has failed.
    public string Renew()
    {
        stream = new NegotiateStream(tcp.GetStream(), true);
        return "ok";
    }

    public string Login(string user, string password, string domain, string target, string protection, string impersonation)
    {
        NetworkCredential credential =
            user == null ? CredentialCache.DefaultNetworkCredentials : new NetworkCredential(user, password, domain);
        stream.AuthenticateAsClient(
            credential,
            target,
            Words.Choice<ProtectionLevel>(protection),
            Words.Choice<TokenImpersonationLevel>(impersonation));
        return Words.Of(stream);
    }

    public string Write(byte[] data)
    {
        stream.Write(data, 0, data.Length);
        return "ok";
    }

    // One Read.
    public string Read(int limit)
    {
        var buffer = new byte[limit];
        return "ok " + Words.Of(buffer, stream.Read(buffer, 0, limit));
    }

    // As many as are needed; fewer bytes at the stream's end.
    public string ReadExactly(int count)
    {
        var buffer = new byte[count];
        return "ok " + Words.Of(buffer, Fill(buffer, count));
    }

    int Fill(byte[] buffer, int count)
    {
        int filled = 0;
        while (filled < count)
        {
            int more = stream.Read(buffer, filled, count - filled);
            if (more == 0) break;
            filled += more;
        }
        return filled;
    }

    // Messages of the given sizes in turn, and back; at most `window` of them are under way.
    public string Echo(int count, int window, int[] sizes)
    {
        const int Starts = 4096;
        var pattern = new byte[sizes.Max() + Starts];
        new Random(1).NextBytes(pattern);
        // No two neighbours are alike, nor in the same place of a record.
        Func<int, int> start = number => (int)((uint)number * 2654435761u >> 20);
        var received = new byte[sizes.Max()];
        Action<int> write = number => stream.Write(pattern, start(number), sizes[number % sizes.Length]);
        Action<int> read = number =>
        {
            int size = sizes[number % sizes.Length], from = start(number);
            int filled = Fill(received, size);
            if (filled < size) throw new EndOfStreamException($"message {number}: {filled} bytes of {size}");
            for (int i = 0; i < size; i++)
                if (received[i] != pattern[from + i]) throw new InvalidDataException($"message {number}: byte {i} differs");
        };
        Stopwatch watch = Stopwatch.StartNew();
        if (window == 1)
        {
            for (int number = 0; number < count; number++)
            {
                write(number);
                read(number);
            }
        }
        else
        {
            WriteAhead(count, window, write, read);
        }
        return $"ok {watch.Elapsed.TotalSeconds:R}";
    }

    static void WriteAhead(int count, int window, Action<int> write, Action<int> read)
    {
        var free = new SemaphoreSlim(window);
        var stop = new CancellationTokenSource();
        Task writer = Task.Factory.StartNew(
            () =>
            {
                for (int number = 0; number < count; number++)
                {
                    free.Wait(stop.Token);
                    write(number);
                }
            },
            TaskCreationOptions.LongRunning);
        try
        {
            for (int number = 0; number < count; number++)
            {
                read(number);
                free.Release();
            }
        }
        catch
        {
            stop.Cancel();
            throw;
        }
        writer.GetAwaiter().GetResult();
    }

    // The end of what this side sends; it can still read. NegotiateStream itself has no such thing.
    public string Shutdown()
    {
        tcp.Client.Shutdown(SocketShutdown.Send);
        return "ok";
    }

    public string Close()
    {
        stream.Dispose();
        tcp.Dispose();
        return "ok";
    }
}

// Sends back whatever comes, on any number of connections.
sealed class EchoServer
{
    readonly TcpListener listener = new TcpListener(IPAddress.Loopback, 0);
    readonly BlockingCollection<string> logins = new BlockingCollection<string>();
    readonly BlockingCollection<string> ends = new BlockingCollection<string>();
    readonly ProtectionLevel protection;
    readonly TokenImpersonationLevel impersonation;
    readonly int tries;

    public EchoServer(string protection, string impersonation, int tries)
    {
        this.protection = Words.Choice<ProtectionLevel>(protection);
        this.impersonation = Words.Choice<TokenImpersonationLevel>(impersonation);
        this.tries = tries;
        listener.Start(1024);
        AcceptAll();
    }

    public int Port => ((IPEndPoint)listener.LocalEndpoint).Port;

    public string NextLogin() => logins.Take();

    public string NextEnd() => ends.Take();

    public string Close()
    {
        listener.Stop();
        return "ok";
    }

    async void AcceptAll()
    {
        while (true)
        {
            TcpClient tcp;
            try
            {
                tcp = await listener.AcceptTcpClientAsync().ConfigureAwait(false);
            }
            catch (Exception)  // stopped
            {
                return;
            }
            Serve(tcp);
        }
    }

    async void Serve(TcpClient tcp)
    {
        string end = "ok";
        try
        {
            using (tcp)
            using (NegotiateStream stream = await LogIn(tcp).ConfigureAwait(false))
            {
                if (stream == null) return;
                await stream.CopyToAsync(stream, 65536).ConfigureAwait(false);
            }
        }
        catch (Exception e)
        {
            end = Words.Of(e);
        }
        ends.Add(end);
    }

    async Task<NegotiateStream> LogIn(TcpClient tcp)
    {
        tcp.NoDelay = true;
        for (int left = tries; left > 0; left--)
        {
            // One for each try: .NET 8 has no second one.
            var stream = new NegotiateStream(tcp.GetStream(), true);
            try
            {
                await stream
                    .AuthenticateAsServerAsync(CredentialCache.DefaultNetworkCredentials, protection, impersonation)
                    .ConfigureAwait(false);
                logins.Add(Words.Of(stream));
                return stream;
            }
            catch (Exception e)
            {
                logins.Add(Words.Of(e));
                stream.Dispose();
            }
        }
        return null;
    }
}

static class Program
{
    static readonly ConcurrentDictionary<int, Client> clients = new ConcurrentDictionary<int, Client>();
    static readonly ConcurrentDictionary<int, EchoServer> servers = new ConcurrentDictionary<int, EchoServer>();

    static void Main()
    {
        string line;
        while ((line = Console.In.ReadLine()) != null)
        {
            string[] words = line.Split(' ');
            var thread = new Thread(() => Answer(words));
            thread.IsBackground = true;  // whatever still waits ends with stdin
            thread.Start();
        }
    }

    static void Answer(string[] words)
    {
        string answer;
        try
        {
            answer = Do(words[1], int.Parse(words[2]), words.Skip(3).ToArray());
        }
        catch (Exception e)
        {
            answer = Words.Of(e);
        }
        lock (clients)
        {
            Console.Out.WriteLine($"{words[0]} {answer}");
            Console.Out.Flush();
        }
    }

    static string Do(string verb, int number, string[] words)
    {
        switch (verb)
        {
            case "connect":
                clients[number] = new Client(int.Parse(words[0]));
                return "ok";
            case "renew":
                return clients[number].Renew();
            case "login":
                string[] texts = words.Take(4).Select(Words.Text).ToArray();
                return clients[number].Login(texts[0], texts[1], texts[2], texts[3], words[4], words[5]);
            case "write":
                return clients[number].Write(Words.Bytes(words[0]));
            case "read":
                return clients[number].Read(int.Parse(words[0]));
            case "read-exactly":
                return clients[number].ReadExactly(int.Parse(words[0]));
            case "echo":
                int[] sizes = words[2].Split(',').Select(int.Parse).ToArray();
                return clients[number].Echo(int.Parse(words[0]), int.Parse(words[1]), sizes);
            case "shutdown":
                return clients[number].Shutdown();
            case "close":
                Client closing;
                return clients.TryRemove(number, out closing) ? closing.Close() : "ok";
            case "listen":
                servers[number] = new EchoServer(words[0], words[1], int.Parse(words[2]));
                return $"ok {servers[number].Port}";
            case "next-login":
                return servers[number].NextLogin();
            case "next-end":
                return servers[number].NextEnd();
            case "stop":
                EchoServer stopping;
                return servers.TryRemove(number, out stopping) ? stopping.Close() : "ok";
            default:
                throw new ArgumentException(verb);
        }
    }
}
